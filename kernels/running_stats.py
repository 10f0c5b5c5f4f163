"""Mean and squared deviations of a chunk of rows in one pass, merged into the running ones.

Chan, Golub and LeVeque (1979), for the parts a and b of a sample:

    d = mean_b - mean_a;   mean = mean_a + d n_b / (n_a + n_b);   M2 = M2_a + M2_b + d^2 n_a n_b / (n_a + n_b)

Each tile of rows is centred on its own mean in registers, so that a mean far larger than the deviations costs
no digits. Splits of the rows are merged in order: the same rows give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import configs
from .configs import cdiv


@triton.jit
def _merge(n_a, mean_a, m2_a, n_b, mean_b, m2_b):
    n = n_a + n_b
    weight = n_b / tl.maximum(n, 1.0)
    d = mean_b - mean_a
    return n, mean_a + d * weight, m2_a + m2_b + d * d * (n_a * weight)


@triton.jit
def _running_stats_chunk_kernel(
    rows_ptr, mask_ptr, part_count_ptr, part_mean_ptr, part_m2_ptr,
    n_rows, width, rows_per_split, stride_row,
    HAS_MASK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Count, mean and M2 of each split's rows, [splits], [splits, d], [splits, d]."""
    split = tl.program_id(1)
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < width
    count = 0.0
    mean = tl.zeros([BLOCK_D], dtype=tl.float32)
    m2 = tl.zeros([BLOCK_D], dtype=tl.float32)
    first = split * rows_per_split
    for start in range(first, tl.minimum(first + rows_per_split, n_rows), BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        keep = offs_n < n_rows
        if HAS_MASK:
            keep = keep & (tl.load(mask_ptr + offs_n, mask=keep, other=0) != 0)
        tile = keep[:, None] & mask_d[None, :]
        x = rows_ptr + offs_n.to(tl.int64)[:, None] * stride_row + offs_d[None, :]
        x = tl.load(x, mask=tile, other=0.0).to(tl.float32)
        own = tl.sum(keep.to(tl.float32), axis=0)
        own_mean = tl.sum(x, axis=0) / tl.maximum(own, 1.0)
        away = tl.where(tile, x - own_mean[None, :], 0.0)
        # the rounding of own_mean leaves a sum that should be 0; taking it out makes the tile's mean exact
        rest = tl.sum(away, axis=0) / tl.maximum(own, 1.0)
        own_m2 = tl.sum(away * away, axis=0) - own * rest * rest
        count, mean, m2 = _merge(count, mean, m2, own, own_mean + rest, own_m2)
    at = split.to(tl.int64) * width + offs_d
    tl.store(part_mean_ptr + at, mean, mask=mask_d)
    tl.store(part_m2_ptr + at, m2, mask=mask_d)
    if tl.program_id(0) == 0:
        tl.store(part_count_ptr + split, count)


@triton.jit
def _running_stats_merge_kernel(
    count_ptr,
    mean_ptr,
    m2_ptr,
    part_count_ptr,
    part_mean_ptr,
    part_m2_ptr,
    width,
    splits,
    BLOCK_D: tl.constexpr,
):
    """mean, m2 <- (count, mean, m2) merged with all parts, in order."""
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < width
    count = 0.0
    mean = tl.zeros([BLOCK_D], dtype=tl.float32)
    m2 = tl.zeros([BLOCK_D], dtype=tl.float32)
    for split in range(splits):
        at = split * tl.full([], 1, tl.int64) * width + offs_d
        own = tl.load(part_count_ptr + split)
        own_mean = tl.load(part_mean_ptr + at, mask=mask_d, other=0.0)
        own_m2 = tl.load(part_m2_ptr + at, mask=mask_d, other=0.0)
        count, mean, m2 = _merge(count, mean, m2, own, own_mean, own_m2)
    running = tl.load(count_ptr).to(tl.float32)
    mean_a = tl.load(mean_ptr + offs_d, mask=mask_d, other=0.0)
    m2_a = tl.load(m2_ptr + offs_d, mask=mask_d, other=0.0)
    _, mean, m2 = _merge(running, mean_a, m2_a, count, mean, m2)
    tl.store(mean_ptr + offs_d, mean, mask=mask_d)
    tl.store(m2_ptr + offs_d, m2, mask=mask_d)


def running_stats_(count, mean, m2, rows, mask) -> None:
    """Merge rows [N, d] (those whose mask is nonzero) into count, mean [d] and m2 [d], in place."""
    for name, value in (("mean", mean), ("m2", m2)):
        if not value.is_contiguous():
            raise ValueError(f"running_stats_: {name} must be contiguous, since it is written in place.")
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    n_rows, width = rows.shape
    config = configs.lookup("running_stats", rows.device, n_rows)
    tiles = cdiv(width, config.block_d)
    wanted = cdiv(configs.sm_count(rows.device) * config.programs_per_sm, tiles)
    per_split = cdiv(cdiv(n_rows, wanted), config.block_n) * config.block_n
    splits = cdiv(n_rows, per_split)
    part_count = torch.empty(splits, dtype=torch.float32, device=rows.device)
    part_mean = torch.empty((splits, width), dtype=torch.float32, device=rows.device)
    part_m2 = torch.empty_like(part_mean)
    if mask is not None:
        mask = mask.ne(0).contiguous()
    with torch.cuda.device_of(rows):
        _running_stats_chunk_kernel[(tiles, splits)](
            rows, part_count if mask is None else mask, part_count, part_mean, part_m2,
            n_rows, width, per_split, rows.stride(0), HAS_MASK=mask is not None,
            BLOCK_N=config.block_n, BLOCK_D=config.block_d, num_warps=config.warps,
        )  # fmt: skip
        _running_stats_merge_kernel[(tiles,)](
            count, mean, m2, part_count, part_mean, part_m2, width, splits,
            BLOCK_D=config.block_d, num_warps=config.warps,
        )  # fmt: skip
    # after the kernel: every tile of it reads the old count
    count.add_(n_rows if mask is None else mask.sum().to(count.dtype))
