"""KL(softmax(p) || softmax(q)) per row: one pass over both logits with an online softmax, and q's gradient.

    KL = sum_v e_v (p_v - q_v) / Z_p - (max_p - max_q) + log(Z_q / Z_p),   e_v = exp(p_v - max_p)
    dKL / dq_v = exp(q_v - lse_q) - exp(p_v - lse_p)

Neither softmax is ever stored. A row is split over programs where there are few rows; a second kernel puts
the parts together in order. Positions that aren't kept are not read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import configs
from ._vocabulary import plan, row_major
from .configs import cdiv


@triton.jit
def _kl_divergence_fwd_kernel(
    p_ptr, q_ptr, keep_ptr, parts_ptr, length, vocabulary, chunk, splits,
    stride_p_b, stride_p_s, stride_q_b, stride_q_s, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """parts[row, split] = (max_p, Z_p, sum e (p - q), max_q, Z_q) over the split's part of the vocabulary."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    start = split * chunk
    stop = tl.minimum(start + chunk, vocabulary)
    if tl.load(keep_ptr + row) == 0:
        stop = start
    p_ptr += (row // length) * stride_p_b + (row % length) * stride_p_s
    q_ptr += (row // length) * stride_q_b + (row % length) * stride_q_s
    top_p = float("-inf")
    top_q = float("-inf")
    sum_p = 0.0
    sum_q = 0.0
    cross = 0.0
    for v in range(start, stop, BLOCK_V):
        offs = v + tl.arange(0, BLOCK_V)
        mask = offs < stop
        p = tl.load(p_ptr + offs, mask=mask, other=float("-inf")).to(tl.float32)
        q = tl.load(q_ptr + offs, mask=mask, other=float("-inf")).to(tl.float32)
        new_p = tl.maximum(top_p, tl.max(p, axis=0))
        new_q = tl.maximum(top_q, tl.max(q, axis=0))
        base_p = tl.where(new_p == float("-inf"), 0.0, new_p)
        base_q = tl.where(new_q == float("-inf"), 0.0, new_q)
        e = tl.exp(p - base_p)
        shrink = tl.exp(top_p - base_p)
        sum_p = sum_p * shrink + tl.sum(e, axis=0)
        # an impossible token of p has weight 0, whatever q says
        cross = cross * shrink + tl.sum(tl.where(e > 0, e * (p - q), 0.0), axis=0)
        sum_q = sum_q * tl.exp(top_q - base_q) + tl.sum(tl.exp(q - base_q), axis=0)
        top_p = new_p
        top_q = new_q
    at = parts_ptr + (row * splits + split) * 5
    tl.store(at, top_p)
    tl.store(at + 1, sum_p)
    tl.store(at + 2, cross)
    tl.store(at + 3, top_q)
    tl.store(at + 4, sum_q)


@triton.jit
def _kl_divergence_sum_kernel(keep_ptr, parts_ptr, kl_ptr, lse_p_ptr, lse_q_ptr, splits, BLOCK_S: tl.constexpr):
    """KL and both log-sum-exps of a row from its parts; 0 where it isn't kept."""
    row = tl.program_id(0).to(tl.int64)
    kept = tl.load(keep_ptr + row) != 0
    offs = tl.arange(0, BLOCK_S)
    mask = offs < splits
    at = parts_ptr + (row * splits + offs) * 5
    top_p = tl.load(at, mask=mask, other=float("-inf"))
    sum_p = tl.load(at + 1, mask=mask, other=0.0)
    cross = tl.load(at + 2, mask=mask, other=0.0)
    top_q = tl.load(at + 3, mask=mask, other=float("-inf"))
    sum_q = tl.load(at + 4, mask=mask, other=0.0)
    max_p = tl.max(top_p, axis=0)
    max_q = tl.max(top_q, axis=0)
    # a part of impossible tokens adds nothing; a NaN is no 0, and stays
    shrink = tl.where(sum_p == 0, 0.0, tl.exp(top_p - max_p))
    z_p = tl.sum(sum_p * shrink, axis=0)
    z_q = tl.sum(tl.where(sum_q == 0, 0.0, sum_q * tl.exp(top_q - max_q)), axis=0)
    kl = tl.sum(cross * shrink, axis=0) / z_p - (max_p - max_q) + tl.log(z_q / z_p)
    tl.store(kl_ptr + row, tl.where(kept, kl, 0.0))
    tl.store(lse_p_ptr + row, tl.where(kept, max_p + tl.log(z_p), 0.0))
    tl.store(lse_q_ptr + row, tl.where(kept, max_q + tl.log(z_q), 0.0))


@triton.jit
def _kl_divergence_bwd_kernel(
    grad_ptr, p_ptr, q_ptr, keep_ptr, lse_p_ptr, lse_q_ptr, out_ptr, length, vocabulary,
    stride_p_b, stride_p_s, stride_q_b, stride_q_s, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """out = grad (exp(q - lse_q) - exp(p - lse_p)), 0 where the position isn't kept"""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = offs < vocabulary
    kept = tl.load(keep_ptr + row) != 0
    readable = tl.where(kept, vocabulary, 0)
    p_ptr += (row // length) * stride_p_b + (row % length) * stride_p_s
    q_ptr += (row // length) * stride_q_b + (row % length) * stride_q_s
    p = tl.load(p_ptr + offs, mask=offs < readable, other=float("-inf")).to(tl.float32)
    q = tl.load(q_ptr + offs, mask=offs < readable, other=float("-inf")).to(tl.float32)
    out = tl.exp(q - tl.load(lse_q_ptr + row)) - tl.exp(p - tl.load(lse_p_ptr + row))
    out = tl.where(kept, out * tl.load(grad_ptr + row).to(tl.float32), 0.0)
    tl.store(out_ptr + row * vocabulary + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


def forward(base_logits, logits, keep) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # [B, S] x 3
    """(KL, log-sum-exp of the base, log-sum-exp of the edited) of each row, float32."""
    p, q, keep = row_major(base_logits), row_major(logits), keep.contiguous()
    rows = keep.numel()
    kl, lse_p, lse_q = (torch.empty(keep.shape, dtype=torch.float32, device=q.device) for _ in range(3))
    if rows == 0:
        return kl, lse_p, lse_q
    config, splits, chunk = plan(q)
    parts = torch.empty((rows, splits, 5), dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        _kl_divergence_fwd_kernel[(rows, splits)](
            p, q, keep, parts, q.shape[1], q.shape[2], chunk, splits, *p.stride()[:2], *q.stride()[:2],
            BLOCK_V=config.block_d, num_warps=config.warps,
        )  # fmt: skip
        _kl_divergence_sum_kernel[(rows,)](
            keep, parts, kl, lse_p, lse_q, splits, BLOCK_S=triton.next_power_of_2(splits), num_warps=1
        )
    return kl, lse_p, lse_q


def backward(grad, base_logits, logits, keep, lse_p, lse_q) -> torch.Tensor:  # [B, S, V]
    """The gradient of the edited logits, in their dtype."""
    p, q, keep = row_major(base_logits), row_major(logits), keep.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if keep.numel() == 0:
        return out
    config = configs.lookup("vocabulary_bwd", q.device, keep.numel())
    with torch.cuda.device_of(q):
        _kl_divergence_bwd_kernel[(keep.numel(), cdiv(q.shape[2], config.block_d))](
            grad.contiguous(), p, q, keep, lse_p, lse_q, out, q.shape[1], q.shape[2],
            *p.stride()[:2], *q.stride()[:2], BLOCK_V=config.block_d, num_warps=config.warps,
        )  # fmt: skip
    return out
