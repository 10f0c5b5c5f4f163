"""Negative log-likelihood per row: one pass over the vocabulary with an online softmax, and its gradient.

    nll = log sum_v exp(x_v) - x_label;     d nll / d x_v = exp(x_v - lse) - [v = label]

A row is split over programs where there are few rows; each keeps (max, sum of exp(x - max)), and a second
kernel puts the parts together in order. Rows without a label are not read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..types import IGNORE as _IGNORE
from . import configs
from ._vocabulary import plan, row_major
from .configs import cdiv

IGNORE = tl.constexpr(_IGNORE)


@triton.jit
def _online(top, total, x):
    """(max, sum of exp(x - max)) with one more tile; -inf, an impossible token, adds nothing."""
    new = tl.maximum(top, tl.max(x, axis=0))
    base = tl.where(new == float("-inf"), 0.0, new)
    return new, total * tl.exp(top - base) + tl.sum(tl.exp(x - base), axis=0)


@triton.jit
def _token_nll_fwd_kernel(
    logits_ptr,
    labels_ptr,
    parts_ptr,
    length,
    vocabulary,
    chunk,
    splits,
    stride_b,
    stride_s,
    BLOCK_V: tl.constexpr,
):
    """parts[row, split] = (max, sum) over the split's part of the vocabulary."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    start = split * chunk
    stop = tl.minimum(start + chunk, vocabulary)
    if tl.load(labels_ptr + row) == IGNORE:
        stop = start
    x_ptr = logits_ptr + (row // length) * stride_b + (row % length) * stride_s
    top = float("-inf")
    total = 0.0
    for v in range(start, stop, BLOCK_V):
        offs = v + tl.arange(0, BLOCK_V)
        x = tl.load(x_ptr + offs, mask=offs < stop, other=float("-inf")).to(tl.float32)
        top, total = _online(top, total, x)
    at = parts_ptr + (row * splits + split) * 2
    tl.store(at, top)
    tl.store(at + 1, total)


@triton.jit
def _token_nll_sum_kernel(
    logits_ptr,
    labels_ptr,
    parts_ptr,
    nll_ptr,
    lse_ptr,
    length,
    splits,
    stride_b,
    stride_s,
    BLOCK_S: tl.constexpr,
):
    """lse and nll of a row from its parts; both 0 without a label."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_S)
    at = parts_ptr + (row * splits + offs) * 2
    top = tl.load(at, mask=offs < splits, other=float("-inf"))
    total = tl.load(at + 1, mask=offs < splits, other=0.0)
    label = tl.load(labels_ptr + row)
    kept = label != IGNORE
    highest = tl.max(top, axis=0)
    # a part of impossible tokens adds nothing; a NaN is no 0, and stays
    log_sum = tl.log(tl.sum(tl.where(total == 0, 0.0, total * tl.exp(top - highest)), axis=0))
    x_ptr = logits_ptr + (row // length) * stride_b + (row % length) * stride_s
    x = tl.load(x_ptr + tl.where(kept, label, 0)).to(tl.float32)
    tl.store(nll_ptr + row, tl.where(kept, log_sum + (highest - x), 0.0))
    tl.store(lse_ptr + row, tl.where(kept, log_sum + highest, 0.0))


@triton.jit
def _token_nll_bwd_kernel(
    grad_ptr, logits_ptr, labels_ptr, lse_ptr, out_ptr, length, vocabulary, stride_b, stride_s,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """out = grad (exp(x - lse) - [v = label]), 0 without a label"""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = offs < vocabulary
    label = tl.load(labels_ptr + row)
    kept = label != IGNORE
    readable = tl.where(kept, vocabulary, 0)
    x_ptr = logits_ptr + (row // length) * stride_b + (row % length) * stride_s
    x = tl.load(x_ptr + offs, mask=offs < readable, other=float("-inf")).to(tl.float32)
    out = tl.exp(x - tl.load(lse_ptr + row)) - tl.where(offs == label, 1.0, 0.0)
    out = tl.where(kept, out * tl.load(grad_ptr + row).to(tl.float32), 0.0)
    tl.store(out_ptr + row * vocabulary + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


def forward(logits, labels) -> tuple[torch.Tensor, torch.Tensor]:  # [B, S, V], [B, S] -> [B, S] x 2
    """(nll, log-sum-exp) of each row, float32."""
    logits, labels = row_major(logits), labels.contiguous()
    rows = labels.numel()
    nll = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)
    lse = torch.empty_like(nll)
    if rows == 0:
        return nll, lse
    config, splits, chunk = plan(logits)
    parts = torch.empty((rows, splits, 2), dtype=torch.float32, device=logits.device)
    strides = logits.stride()[:2]
    with torch.cuda.device_of(logits):
        _token_nll_fwd_kernel[(rows, splits)](
            logits, labels, parts, logits.shape[1], logits.shape[2], chunk, splits, *strides,
            BLOCK_V=config.block_d, num_warps=config.warps,
        )  # fmt: skip
        _token_nll_sum_kernel[(rows,)](
            logits, labels, parts, nll, lse, logits.shape[1], splits, *strides,
            BLOCK_S=triton.next_power_of_2(splits), num_warps=1,
        )  # fmt: skip
    return nll, lse


def backward(grad, logits, labels, lse) -> torch.Tensor:  # [B, S, V]
    """The gradient of the logits, in their dtype."""
    logits, labels = row_major(logits), labels.contiguous()
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if labels.numel() == 0:
        return out
    config = configs.lookup("vocabulary_bwd", logits.device, labels.numel())
    with torch.cuda.device_of(logits):
        _token_nll_bwd_kernel[(labels.numel(), cdiv(logits.shape[2], config.block_d))](
            grad.contiguous(), logits, labels, lse, out, logits.shape[1], logits.shape[2],
            *logits.stride()[:2], BLOCK_V=config.block_d, num_warps=config.warps,
        )  # fmt: skip
    return out
