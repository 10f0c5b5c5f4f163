"""The matrix kernels that ``editor_mlp`` and ``lowrank_linear`` share, and their launchers.

All of them are one contraction, ``acc[o, n] = sum_k A[o, k] B[n, k]``, under different strides:

    project   c = x W^T          o: rank        n: rows   k: the wide side, split over programs
    expand    y = c W + r        o: wide side   n: rows   k: rank
    outer     W' = x^T c         o: wide side   n: rank   k: rows

A is the operand that comes from registers, and so may have either dimension contiguous; rows stand on the
side that tensor cores take in eights, so that 20 rows cost 32 and not 64.

A wide side may lie in two tensors, u [N, m] and delta [N, n]. A tile or a split belongs to one of them, never
to both, so each program picks its pointers once. Splits of a long reduction are summed from a workspace, in
order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import configs
from .configs import cdiv


@triton.jit
def _contract(
    a_ptr, b_ptr, mean_ptr, std_ptr,
    offs_o, offs_n, mask_o, mask_n, start, stop, limit,
    stride_a_o, stride_a_k, stride_b_n, stride_b_k, eps,
    NORM_A: tl.constexpr,  # A is rows, normalised by statistics indexed by o
    NORM_B: tl.constexpr,  # B is rows, normalised by statistics indexed by k
    BLOCK_O: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc[o, n] = sum over start <= k < min(stop, limit) of A[o, k] B[n, k], in float32."""
    offs_k = tl.arange(0, BLOCK_K)
    first = start + offs_k
    a_tile = a_ptr + offs_o.to(tl.int64)[:, None] * stride_a_o + first.to(tl.int64)[None, :] * stride_a_k
    b_tile = b_ptr + first.to(tl.int64)[:, None] * stride_b_k + offs_n.to(tl.int64)[None, :] * stride_b_n
    if NORM_A:
        a_mean = tl.load(mean_ptr + offs_o, mask=mask_o, other=0.0)
        a_scale = 1.0 / (tl.load(std_ptr + offs_o, mask=mask_o, other=1.0) + eps)
    step_a = stride_a_k * tl.full([], BLOCK_K, tl.int64)
    step_b = stride_b_k * tl.full([], BLOCK_K, tl.int64)
    acc = tl.zeros([BLOCK_O, BLOCK_N], dtype=tl.float32)
    for k in range(start, stop, BLOCK_K):
        mask_k = k + offs_k < limit
        a = tl.load(a_tile, mask=mask_o[:, None] & mask_k[None, :], other=0.0).to(tl.float32)
        b = tl.load(b_tile, mask=mask_k[:, None] & mask_n[None, :], other=0.0).to(tl.float32)
        # where k is masked one factor is 0 and the other finite, normalised or not
        if NORM_A:
            a = (a - a_mean[:, None]) * a_scale[:, None]
        if NORM_B:
            b_mean = tl.load(mean_ptr + k + offs_k, mask=mask_k, other=0.0)
            b_scale = 1.0 / (tl.load(std_ptr + k + offs_k, mask=mask_k, other=1.0) + eps)
            b = (b - b_mean[:, None]) * b_scale[:, None]
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        a_tile += step_a
        b_tile += step_b
    return acc


@triton.jit
def _factor(alpha_ptr, scale, HAS_ALPHA: tl.constexpr):
    factor = scale
    if HAS_ALPHA:
        factor = scale * tl.load(alpha_ptr).to(tl.float32)
    return factor


@triton.jit
def _project_kernel(
    weight_ptr, x0_ptr, x1_ptr, mean0_ptr, std0_ptr, mean1_ptr, std1_ptr, out_ptr,
    n_rows, n_out, width0, width1, splits0, chunk0, chunk1, batches,
    stride_weight_batch, stride_weight_o, stride_weight_k, stride_x_batch, stride_x0_row, stride_x1_row, eps,
    TWO: tl.constexpr, NORM: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[split, batch, n, o] = sum over the split's k of x[n, k] weight[o, k], x normalised on the way."""
    tiles_o = tl.cdiv(n_out, BLOCK_O)
    pid_o = tl.program_id(0) % tiles_o
    pid_n = tl.program_id(0) // tiles_o
    split = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    offs_o = pid_o * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_o = offs_o < n_out
    mask_n = offs_n < n_rows
    weight_ptr += batch * stride_weight_batch
    x_ptr = x0_ptr
    mean_ptr = mean0_ptr
    std_ptr = std0_ptr
    stride_row = tl.full([], 1, tl.int64) * stride_x0_row
    start = split * chunk0
    stop = tl.minimum(start + chunk0, width0)
    limit = width0 + tl.zeros([], tl.int32)  # a width of 1 is a constant, which can't be given another value
    if TWO:
        if split >= splits0:
            x_ptr = x1_ptr
            mean_ptr = mean1_ptr
            std_ptr = std1_ptr
            stride_row = tl.full([], 1, tl.int64) * stride_x1_row
            weight_ptr += width0 * tl.full([], 1, tl.int64) * stride_weight_k
            start = (split - splits0) * chunk1
            stop = tl.minimum(start + chunk1, width1)
            limit = width1 + tl.zeros([], tl.int32)
    acc = _contract(
        weight_ptr, x_ptr + batch * stride_x_batch, mean_ptr, std_ptr,
        offs_o, offs_n, mask_o, mask_n, start, stop, limit,
        stride_weight_o, stride_weight_k, stride_row, 1, eps,
        False, NORM, BLOCK_O, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    out_row = (split * batches + batch) * n_rows + offs_n.to(tl.int64)
    out = out_ptr + out_row[None, :] * n_out + offs_o[:, None]
    tl.store(out, acc, mask=mask_o[:, None] & mask_n[None, :])


@triton.jit
def _sum_splits_kernel(parts_ptr, out_ptr, numel, splits, BLOCK: tl.constexpr):
    """out[i] = sum_s parts[s, i], in the order of the splits."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    for split in range(splits):
        acc += tl.load(parts_ptr + split * tl.full([], 1, tl.int64) * numel + offs, mask=mask, other=0.0)
    tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _expand_kernel(
    weight_ptr, c_ptr, residual_ptr, alpha_ptr, out_ptr, scale,
    n_rows, n_out, n_rank,
    stride_weight_batch, stride_weight_o, stride_weight_k, stride_c_batch, stride_c_row,
    stride_residual_batch, stride_residual_row, stride_out_batch, stride_out_row,
    HAS_RESIDUAL: tl.constexpr, HAS_ALPHA: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[batch, n, o] = residual[batch, n, o] + scale alpha sum_k c[n, k] weight[o, k]."""
    tiles_o = tl.cdiv(n_out, BLOCK_O)
    batch = tl.program_id(1).to(tl.int64)
    offs_o = (tl.program_id(0) % tiles_o) * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_n = (tl.program_id(0) // tiles_o) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_o = offs_o < n_out
    mask_n = offs_n < n_rows
    acc = _contract(
        weight_ptr + batch * stride_weight_batch, c_ptr + batch * stride_c_batch, c_ptr, c_ptr,
        offs_o, offs_n, mask_o, mask_n, 0, n_rank, n_rank,
        stride_weight_o, stride_weight_k, stride_c_row, 1, 0.0,
        False, False, BLOCK_O, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    mask = mask_o[:, None] & mask_n[None, :]
    acc = acc * _factor(alpha_ptr, scale, HAS_ALPHA)
    row = offs_n.to(tl.int64)[None, :]
    if HAS_RESIDUAL:
        residual = residual_ptr + batch * stride_residual_batch + row * stride_residual_row + offs_o[:, None]
        acc += tl.load(residual, mask=mask, other=0.0).to(tl.float32)
    out = out_ptr + batch * stride_out_batch + row * stride_out_row + offs_o[:, None]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _outer_kernel(
    x0_ptr, x1_ptr, mean0_ptr, std0_ptr, mean1_ptr, std1_ptr, c_ptr, alpha_ptr, out_ptr, scale,
    n_rows, width0, width1, n_rank, tiles0,
    stride_x_batch, stride_x0_row, stride_x1_row, stride_c_batch, stride_c_row,
    stride_out_batch, stride_out_o, stride_out_n, eps,
    TWO: tl.constexpr, NORM: tl.constexpr, HAS_ALPHA: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[batch, o, n] = scale alpha sum over rows of x[row, o] c[row, n], x normalised on the way."""
    pid_o = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    x_ptr = x0_ptr
    mean_ptr = mean0_ptr
    std_ptr = std0_ptr
    stride_row = tl.full([], 1, tl.int64) * stride_x0_row
    limit_o = width0 + tl.zeros([], tl.int32)
    first_out = tl.zeros([], dtype=tl.int64)
    tile = pid_o
    if TWO:
        if pid_o >= tiles0:
            x_ptr = x1_ptr
            mean_ptr = mean1_ptr
            std_ptr = std1_ptr
            stride_row = tl.full([], 1, tl.int64) * stride_x1_row
            limit_o = width1 + tl.zeros([], tl.int32)
            first_out = tl.full([], 1, tl.int64) * width0
            tile = pid_o - tiles0
    offs_o = tile * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_o = offs_o < limit_o
    mask_n = offs_n < n_rank
    acc = _contract(
        x_ptr + batch * stride_x_batch, c_ptr + batch * stride_c_batch, mean_ptr, std_ptr,
        offs_o, offs_n, mask_o, mask_n, 0, n_rows, n_rows,
        1, stride_row, 1, stride_c_row, eps,
        NORM, False, BLOCK_O, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    acc = acc * _factor(alpha_ptr, scale, HAS_ALPHA)
    out_o = (first_out + offs_o)[:, None] * stride_out_o
    out = out_ptr + batch * stride_out_batch + out_o + offs_n.to(tl.int64)[None, :] * stride_out_n
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask_o[:, None] & mask_n[None, :])


def row_major(x: torch.Tensor) -> torch.Tensor:
    """The tensor itself if its rows are contiguous, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 and x.is_contiguous() else x.contiguous()


def split_reduction(wanted: int, widths: tuple[int, int], block_k: int) -> list[int]:
    """[splits, chunk] of either side: about ``wanted`` like chunks in all, each a multiple of the tile."""
    plan, left = [], wanted
    for i, width in enumerate(widths):
        share = left
        if i == 0 and widths[1]:
            share = min(round(wanted * width / sum(widths)), wanted - 1)
        splits = min(max(1, share), cdiv(width, block_k))
        left -= splits
        chunk = max(1, cdiv(cdiv(width, max(1, splits)), block_k)) * block_k
        plan += [cdiv(width, chunk), chunk]
    return plan


def project(
    sides: list[torch.Tensor],  # one or two of [N, d_i], or one [B, N, d]
    weight: torch.Tensor,  # [O, sum d_i] or [B, O, d], any strides
    stats: list[torch.Tensor],  # mean, std of each side, or none
    eps: float,
    precision: str,
) -> torch.Tensor:  # [N, O] or [B, N, O] float32
    """``normalise(cat(sides)) @ weight.T``, the reduction split over programs and summed in order."""
    sides = [row_major(side) for side in sides]
    batched = sides[0].dim() == 3
    batches, n_rows = (sides[0].shape[0] if batched else 1), sides[0].shape[-2]
    n_out, device = weight.shape[-2], weight.device
    x0, x1 = sides[0], sides[-1]
    two = len(sides) == 2
    widths = (x0.shape[-1], x1.shape[-1] if two else 0)
    if not (batches and n_rows and n_out):
        return torch.empty((*x0.shape[:-1], n_out), dtype=torch.float32, device=device)
    config = configs.lookup("project", device, n_rows, precision)
    tiles = cdiv(n_out, config.block_o) * cdiv(n_rows, config.block_n)
    # rounded down: one program more than fits at once would double the time
    wanted = max(1, configs.sm_count(device) * config.programs_per_sm // (tiles * batches))
    splits0, chunk0, splits1, chunk1 = split_reduction(wanted, widths, config.block_k)
    splits = splits0 + splits1
    shape = (batches, n_rows, n_out) if batched else (n_rows, n_out)
    parts = torch.empty((splits, *shape), dtype=torch.float32, device=device)
    norm = bool(stats)
    mean0, std0, mean1, std1 = (*stats, *stats)[:4] if norm else (x0, x0, x0, x0)
    with torch.cuda.device_of(weight):
        _project_kernel[(tiles, splits, batches)](
            weight, x0, x1, mean0, std0, mean1, std1, parts,
            n_rows, n_out, *widths, splits0, chunk0, chunk1, batches,
            weight.stride(0) if batched else 0, weight.stride(-2), weight.stride(-1),
            x0.stride(0) if batched else 0, x0.stride(-2), x1.stride(-2), eps,
            TWO=two, NORM=norm, BLOCK_O=config.block_o, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
            PRECISION=precision, num_warps=config.warps, num_stages=config.stages, **config.limits(),
        )  # fmt: skip
        if splits == 1:
            return parts[0]
        out = torch.empty(shape, dtype=torch.float32, device=device)
        sweep = configs.lookup("sum_splits", device, n_rows)
        grid = (cdiv(out.numel(), sweep.block_d),)
        _sum_splits_kernel[grid](parts, out, out.numel(), splits, BLOCK=sweep.block_d, num_warps=sweep.warps)
    return out


def expand(
    c: torch.Tensor,  # [N, K] or [B, N, K] float32
    weight: torch.Tensor,  # [O, K] or [B, O, K], any strides
    residual: torch.Tensor | None,  # shaped as out
    out: torch.Tensor,  # [N, O] or [B, N, O]
    precision: str,
    *,
    scale: float = 1.0,
    alpha: torch.Tensor | None = None,
) -> torch.Tensor:
    """``out = residual + scale * alpha * c @ weight.T``, written and returned."""
    c = row_major(c)
    batched = c.dim() == 3
    batches, n_rows, n_out = (c.shape[0] if batched else 1), c.shape[-2], out.shape[-1]
    if out.numel() == 0:
        return out
    config = configs.lookup("expand", out.device, n_rows, precision)
    tiles = cdiv(n_out, config.block_o) * cdiv(n_rows, config.block_n)
    r = out if residual is None else row_major(residual)
    with torch.cuda.device_of(out):
        _expand_kernel[(tiles, batches)](
            weight, c, r, out if alpha is None else alpha, out, scale,
            n_rows, n_out, c.shape[-1],
            weight.stride(0) if batched else 0, weight.stride(-2), weight.stride(-1),
            c.stride(0) if batched else 0, c.stride(-2),
            r.stride(0) if batched else 0, r.stride(-2), out.stride(0) if batched else 0, out.stride(-2),
            HAS_RESIDUAL=residual is not None, HAS_ALPHA=alpha is not None,
            BLOCK_O=config.block_o, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
            PRECISION=precision, num_warps=config.warps, num_stages=config.stages, **config.limits(),
        )  # fmt: skip
    return out


def outer(
    sides: list[torch.Tensor],  # one or two of [N, d_i], or one [B, N, d]
    c: torch.Tensor,  # [N, R] or [B, N, R] float32
    stats: list[torch.Tensor],
    eps: float,
    out: torch.Tensor,  # [sum d_i, R] or [B, d, R], any strides
    precision: str,
    *,
    scale: float = 1.0,
    alpha: torch.Tensor | None = None,
) -> torch.Tensor:
    """``out = scale * alpha * normalise(cat(sides)).T @ c``, written and returned."""
    sides = [row_major(side) for side in sides]
    c = row_major(c)
    batched = c.dim() == 3
    x0, x1 = sides[0], sides[-1]
    two = len(sides) == 2
    widths = (x0.shape[-1], x1.shape[-1] if two else 0)
    n_rows, n_rank = c.shape[-2], c.shape[-1]
    if out.numel() == 0:
        return out
    config = configs.lookup("outer", out.device, n_rank, precision)
    tiles = [cdiv(width, config.block_o) for width in widths]
    norm = bool(stats)
    mean0, std0, mean1, std1 = (*stats, *stats)[:4] if norm else (c, c, c, c)
    grid = (sum(tiles), cdiv(n_rank, config.block_n), c.shape[0] if batched else 1)
    with torch.cuda.device_of(out):
        _outer_kernel[grid](
            x0, x1, mean0, std0, mean1, std1, c, out if alpha is None else alpha, out, scale,
            n_rows, *widths, n_rank, tiles[0],
            x0.stride(0) if batched else 0, x0.stride(-2), x1.stride(-2),
            c.stride(0) if batched else 0, c.stride(-2),
            out.stride(0) if batched else 0, out.stride(-2), out.stride(-1), eps,
            TWO=two, NORM=norm, HAS_ALPHA=alpha is not None,
            BLOCK_O=config.block_o, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
            PRECISION=precision, num_warps=config.warps, num_stages=config.stages, **config.limits(),
        )  # fmt: skip
    return out
