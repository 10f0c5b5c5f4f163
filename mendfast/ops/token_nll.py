"""Negative log-likelihood of the labelled tokens: checks, choice of backend, autograd."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.autograd.function import once_differentiable

from .. import backends
from ..reference.token_nll import token_nll_rows as _reference_rows
from ..types import IGNORE
from . import _common
from .linear_nll import Logits

CHUNK = 1 << 18
"""Logits worked on at a time outside Triton: temporaries of a megabyte stay in the cache."""


def token_nll_rows(
    logits: torch.Tensor,  # [N, V]
    labels: torch.Tensor,  # [N]
    *,
    backend: str | None = None,
) -> torch.Tensor:  # [N]
    """``logsumexp(logits) - logits[label]`` of each row; 0 where the label is -100. float32 at least.

    The gradient is made from the log-sum-exps; no softmax is kept. Once differentiable. Raises ValueError for
    shapes that don't fit and labels outside the vocabulary (seen on the CPU), TypeError for dtypes.
    """
    if logits.dim() != 2:
        raise ValueError(f"token_nll_rows: logits must be [N, V]; got {tuple(logits.shape)}.")
    if isinstance(logits, Logits) and backend is None:
        _check(logits, labels)
        _check_values(labels, logits.shape[-1])
        return logits.nll(labels)
    return _nll(logits.unsqueeze(0), labels.unsqueeze(0), backend).squeeze(0)


def token_nll(
    logits: torch.Tensor,  # [B, S, V]
    labels: torch.Tensor,  # [B, S]
    *,
    backend: str | None = None,
) -> torch.Tensor:  # [B]
    """Mean over each sample's labelled tokens (label != -100) of -log softmax(logits)[label].

    ``logits[b, s]`` predicts ``labels[b, s]``: a causal model's shift is the caller's.
    A sample without labels gives 0. Errors and gradients as in :func:`token_nll_rows`.
    """
    if logits.dim() == 2 and labels.dim() == 1:  # one token of each sample
        return _nll(logits.unsqueeze(1), labels.unsqueeze(1), backend).squeeze(1)
    if logits.dim() != 3:
        raise ValueError(f"token_nll: logits must be [B, S, V]; got {tuple(logits.shape)}.")
    rows = _nll(logits, labels, backend)
    return rows.sum(-1) / (labels != IGNORE).sum(-1).clamp(min=1)


def _nll(logits, labels, backend):  # [B, S, V], [B, S] -> [B, S]
    _check(logits, labels)
    chosen = backends.choose("token_nll", logits.device, backend, (logits.dtype,))
    if chosen == "reference":
        return _reference_rows(logits.flatten(0, 1), labels.flatten()).view(labels.shape)
    return _TokenNLL.apply(logits, labels, chosen)


class _TokenNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, chosen):
        nll, lse = torch.ops.mendfast.token_nll_fwd(logits, labels, chosen)
        ctx.chosen = chosen
        ctx.save_for_backward(logits, labels, lse)
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        logits, labels, lse = ctx.saved_tensors
        return torch.ops.mendfast.token_nll_bwd(grad, logits, labels, lse, ctx.chosen), None, None


def _check(logits, labels) -> None:
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"token_nll: labels {tuple(labels.shape)} must have the shape of logits {tuple(logits.shape)} "
            "without the vocabulary."
        )
    if labels.dtype.is_floating_point or labels.dtype == torch.bool:
        raise TypeError(f"token_nll: labels are {labels.dtype}; they are token ids, so use int64.")
    if logits.dtype not in _common.ROW_DTYPES:
        raise TypeError(f"token_nll: logits are {logits.dtype}; use float32, bfloat16 or float16.")
    _common.same_device("token_nll", logits=logits, labels=labels)


def _check_values(labels, vocabulary) -> None:
    if labels.numel() and _common.checks_values(labels):
        low, high = (int(v) for v in torch.aminmax(labels))
        if high >= vocabulary or low < 0 and bool(((labels < 0) & (labels != IGNORE)).any()):
            raise ValueError(
                f"token_nll: labels go from {low} to {high}, and the vocabulary from 0 to {vocabulary - 1}; "
                f"use {IGNORE} for tokens without a label."
            )


def row_chunks(keep: torch.Tensor, vocabulary: int, flat: bool) -> Iterator[slice | torch.Tensor | tuple]:
    """Indices of the rows worth computing, some at a time, into [B * S, .] tensors (``flat``) or [B, S, .].

    On the CPU those are the kept ones; elsewhere all, since which are kept can't be known without a wait.
    """
    step = max(1, CHUNK // vocabulary)
    on_cpu = keep.device.type == "cpu"
    if flat and (not on_cpu or bool(keep.all())):
        for i in range(0, keep.numel(), step):
            yield slice(i, i + step)
        return
    index = (keep if on_cpu else torch.ones_like(keep)).flatten().nonzero().squeeze(1)
    for at in index.split(step):
        yield at if flat else (at // keep.shape[1], at % keep.shape[1])


def _aten_fwd(logits, labels):
    kind = torch.promote_types(logits.dtype, torch.float32)
    keep = labels != IGNORE
    shape, flat = labels.shape, logits.is_contiguous()
    if flat:
        logits, labels, keep = logits.flatten(0, 1), labels.flatten(), keep.flatten()
    nll, lse = (torch.zeros(labels.shape, dtype=kind, device=logits.device) for _ in range(2))
    for at in row_chunks(keep.view(shape), logits.shape[-1], flat):
        rows = logits[at].to(kind)
        target = labels[at].clamp(min=0).long().unsqueeze(1)
        top = rows.amax(-1, keepdim=True)
        log_sum = (rows - top).exp_().sum(-1).log_()
        # in this order nothing is lost where the logits are large and the loss is small
        nll[at] = (log_sum + (top - rows.gather(1, target)).squeeze(1)).where(keep[at], 0)
        lse[at] = log_sum + top.squeeze(1)
    return nll.view(shape), lse.view(shape)


def _aten_bwd(grad, logits, labels, lse):
    keep = labels != IGNORE
    out = torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device)
    shape, flat = labels.shape, logits.is_contiguous()
    grad = grad.to(lse.dtype).where(keep, 0)
    target = labels.clamp(min=0).long()
    whole = out
    if flat:
        logits, whole = logits.flatten(0, 1), out.view(-1, logits.shape[-1])
        target, lse, grad = target.flatten(), lse.flatten(), grad.flatten()
    for at in row_chunks(keep.view(shape), logits.shape[-1], flat):
        rows = (logits[at] - lse[at].unsqueeze(1)).exp_()
        rows.scatter_add_(1, target[at].unsqueeze(1), rows.new_full((1, 1), -1.0).expand(rows.shape[0], 1))
        whole[at] = rows.mul_(grad[at].unsqueeze(1)).to(out.dtype)
    return out


def _fwd(logits, labels, backend):
    _check_values(labels, logits.shape[-1])
    if backend == "triton":
        from ..kernels import token_nll as kernel

        return kernel.forward(logits, labels)
    return _aten_fwd(logits, labels)


def _bwd(grad, logits, labels, lse, backend):
    if backend == "triton":
        from ..kernels import token_nll as kernel

        return kernel.backward(grad, logits, labels, lse)
    return _aten_bwd(grad, logits, labels, lse)


def _fwd_fake(logits, labels, backend):
    kind = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(labels.shape, dtype=kind), logits.new_empty(labels.shape, dtype=kind)


_common.define(
    "token_nll_fwd(Tensor logits, Tensor labels, str backend) -> (Tensor, Tensor)", _fwd, _fwd_fake
)
_common.define(
    "token_nll_bwd(Tensor grad, Tensor logits, Tensor labels, Tensor lse, str backend) -> Tensor",
    _bwd,
    lambda grad, logits, labels, lse, backend: logits.new_empty(logits.shape),
)
