"""Negative log-likelihood of the labelled tokens: checks, choice of backend, autograd."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from .. import backends
from ..reference.token_nll import IGNORE
from ..reference.token_nll import token_nll_rows as _reference_rows
from . import _common

CHUNK = 1 << 20
"""Logits worked on at a time outside Triton: temporaries stay this small and in the cache."""


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
    chosen = backends.choose("token_nll", logits.device, backend)
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


def kept_rows(keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices [K], [K] of the rows worth computing: on the CPU the kept ones, elsewhere all, without a wait."""
    if keep.device.type == "cpu":
        return keep.nonzero(as_tuple=True)
    return torch.ones_like(keep, dtype=torch.bool).nonzero_static(size=keep.numel()).unbind(1)


def _aten_fwd(logits, labels):
    kind = torch.promote_types(logits.dtype, torch.float32)
    keep = labels != IGNORE
    nll = logits.new_zeros(labels.shape, dtype=kind)
    lse = logits.new_zeros(labels.shape, dtype=kind)
    b, s = kept_rows(keep)
    step = max(1, CHUNK // logits.shape[-1])
    for i in range(0, b.shape[0], step):
        at = (b[i : i + step], s[i : i + step])
        rows = logits[at].to(kind)
        part = rows.logsumexp(-1)
        target = labels[at].clamp(min=0).long().unsqueeze(1)
        lse[at] = part
        nll[at] = (part - rows.gather(1, target).squeeze(1)).where(keep[at], 0)
    return nll, lse


def _aten_bwd(grad, logits, labels, lse):
    keep = labels != IGNORE
    out = torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device)
    b, s = kept_rows(keep)
    step = max(1, CHUNK // logits.shape[-1])
    for i in range(0, b.shape[0], step):
        at = (b[i : i + step], s[i : i + step])
        rows = logits[at].to(lse.dtype).sub_(lse[at].unsqueeze(1)).exp_()
        target = labels[at].clamp(min=0).long().unsqueeze(1)
        rows.scatter_add_(1, target, rows.new_full((), -1.0).expand(target.shape))
        out[at] = rows.mul_(grad[at].to(lse.dtype).where(keep[at], 0).unsqueeze(1)).to(out.dtype)
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


_common.define("token_nll_fwd(Tensor logits, Tensor labels, str backend) -> (Tensor, Tensor)", _fwd, _fwd_fake)
_common.define(
    "token_nll_bwd(Tensor grad, Tensor logits, Tensor labels, Tensor lse, str backend) -> Tensor",
    _bwd,
    lambda grad, logits, labels, lse, backend: logits.new_empty(logits.shape),
)
backends.register("token_nll", {"triton": _common.triton_probe, "aten": _common.aten_probe})
