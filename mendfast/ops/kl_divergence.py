"""The locality term, KL(base || edited): checks, choice of backend, autograd."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from .. import backends
from ..reference.kl_divergence import kl_divergence_rows as _reference_rows
from . import _common
from ._cpu_extension import kind_of
from .token_nll import row_chunks

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kl_divergence_rows(
    base_logits: torch.Tensor,  # [N, V]
    logits: torch.Tensor,  # [N, V]
    *,
    backend: str | None = None,
) -> torch.Tensor:  # [N]
    """``sum_v p_v (log p_v - log q_v)`` with p = softmax(base_logits), a constant, and q = softmax(logits).

    The gradient, softmax(logits) - softmax(base_logits), is made from the two log-sum-exps; no softmax is
    kept. float32 at least; once differentiable. Raises ValueError for shapes, TypeError for dtypes.
    """
    if logits.dim() != 2:
        raise ValueError(f"kl_divergence_rows: logits must be [N, V]; got {tuple(logits.shape)}.")
    return _kl(base_logits.unsqueeze(0), logits.unsqueeze(0), None, backend).squeeze(0)


def kl_divergence(
    base_logits: torch.Tensor,  # [B, S, V]
    logits: torch.Tensor,  # [B, S, V]
    mask: torch.Tensor,  # [B, S], nonzero = kept
    *,
    backend: str | None = None,
) -> torch.Tensor:  # [B]
    """Mean of the kept positions' KL(softmax(base_logits) || softmax(logits)), per sample.

    No gradient reaches ``base_logits``; positions that the mask drops are not read. A sample that keeps
    nothing gives 0. Errors and gradients as in :func:`kl_divergence_rows`.
    """
    if logits.dim() == 2 and mask.dim() == 1:  # one position of each sample
        return kl_divergence(
            base_logits.unsqueeze(1), logits.unsqueeze(1), mask.unsqueeze(1), backend=backend
        )
    if logits.dim() != 3:
        raise ValueError(f"kl_divergence: logits must be [B, S, V]; got {tuple(logits.shape)}.")
    keep = mask != 0
    return _kl(base_logits, logits, keep, backend).sum(-1) / keep.sum(-1).clamp(min=1)


def _kl(base_logits, logits, keep, backend):  # [B, S, V], [B, S, V], [B, S] -> [B, S]
    _check(base_logits, logits, keep)
    chosen = backends.choose("kl_divergence", logits.device, backend, (base_logits.dtype, logits.dtype))
    if chosen == "reference":
        rows = _reference_rows(base_logits.flatten(0, 1), logits.flatten(0, 1)).view(logits.shape[:2])
        return rows if keep is None else rows.where(keep, 0)
    if keep is None:
        keep = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    return _KL.apply(base_logits.detach(), logits, keep, chosen)


class _KL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, base_logits, logits, keep, chosen):
        kl, lse_base, lse = torch.ops.mendfast.kl_divergence_fwd(base_logits, logits, keep, chosen)
        ctx.chosen = chosen
        ctx.save_for_backward(base_logits, logits, keep, lse_base, lse)
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return None, torch.ops.mendfast.kl_divergence_bwd(grad, *ctx.saved_tensors, ctx.chosen), None, None


def _check(base_logits, logits, keep) -> None:
    if base_logits.shape != logits.shape:
        raise ValueError(
            f"kl_divergence: base_logits {tuple(base_logits.shape)} and logits {tuple(logits.shape)} must "
            "have one shape; run both models on the same tokens."
        )
    if keep is not None and keep.shape != logits.shape[:-1]:
        raise ValueError(
            f"kl_divergence: mask {tuple(keep.shape)} must have the shape of logits {tuple(logits.shape)} "
            "without the vocabulary."
        )
    for name, value in (("base_logits", base_logits), ("logits", logits)):
        if value.dtype not in _common.ROW_DTYPES:
            raise TypeError(f"kl_divergence: {name} are {value.dtype}; use float32, bfloat16 or float16.")
    _common.same_device("kl_divergence", base_logits=base_logits, logits=logits, mask=keep)


def _kind(logits) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _aten_fwd(base_logits, logits, keep):
    kind = _kind(logits)
    shape, flat = keep.shape, base_logits.is_contiguous() and logits.is_contiguous()
    if flat:
        base_logits, logits, keep = base_logits.flatten(0, 1), logits.flatten(0, 1), keep.flatten()
    kl, lse_base, lse = (torch.zeros(keep.shape, dtype=kind, device=logits.device) for _ in range(3))
    for at in row_chunks(keep.view(shape), logits.shape[-1], flat):
        p, q = base_logits[at].to(kind), logits[at].to(kind)
        top_p, top_q = p.amax(-1, keepdim=True), q.amax(-1, keepdim=True)
        p, q = p - top_p, q - top_q
        gap = p - q
        weights = p.exp_()
        sum_p, sum_q = weights.sum(-1), q.exp_().sum(-1)
        # one logarithm of the quotient: of two like sums nothing is lost in a difference
        rows = gap.mul_(weights).sum(-1) / sum_p + (sum_q / sum_p).log()
        kl[at] = rows.where(keep[at], 0)
        lse_base[at], lse[at] = sum_p.log() + top_p.squeeze(1), sum_q.log() + top_q.squeeze(1)
    return kl.view(shape), lse_base.view(shape), lse.view(shape)


def _aten_bwd(grad, base_logits, logits, keep, lse_base, lse):
    out = torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device)
    shape, flat = keep.shape, base_logits.is_contiguous() and logits.is_contiguous()
    grad = grad.to(lse.dtype).where(keep, 0)
    whole = out
    if flat:
        base_logits, logits, whole = (x.flatten(0, 1) for x in (base_logits, logits, out))
        lse_base, lse, grad = lse_base.flatten(), lse.flatten(), grad.flatten()
    for at in row_chunks(keep.view(shape), logits.shape[-1], flat):
        # a wider base is rounded as it was forwards: at 1e30 the rest would be a gap of 1e22
        p = (base_logits[at].to(lse.dtype) - lse_base[at].unsqueeze(1)).exp_()
        q = (logits[at] - lse[at].unsqueeze(1)).exp_()
        whole[at] = q.sub_(p).mul_(grad[at].unsqueeze(1)).to(out.dtype)
    return out


def _kernel_serves(base_logits, logits) -> bool:
    return all(
        x.dtype in _KERNEL_DTYPES and x.device.type == "cpu" and x.numel() > 0 and x.stride(-1) == 1
        for x in (base_logits, logits)
    )


def _given(logits) -> tuple:
    return logits.data_ptr(), logits.stride(0), logits.stride(1), kind_of(logits.dtype)


def _kernel_fwd(base_logits, logits, keep):
    from .. import _cpu

    keep = keep.contiguous()
    kl, lse_base, lse = (logits.new_empty(keep.shape, dtype=torch.float32) for _ in range(3))
    out = kl.data_ptr(), lse_base.data_ptr(), lse.data_ptr()
    _cpu.kl_forward(
        _given(base_logits), _given(logits), keep.data_ptr(), *out, *logits.shape, torch.get_num_threads()
    )
    return kl, lse_base, lse


def _kernel_bwd(grad, base_logits, logits, keep, lse_base, lse):
    from .. import _cpu

    keep, grad = keep.contiguous(), grad.to(torch.float32).contiguous()
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    given = (keep, grad, lse_base.contiguous(), lse.contiguous(), out)
    _cpu.kl_backward(
        _given(base_logits), _given(logits), *(x.data_ptr() for x in given), *logits.shape, torch.get_num_threads()
    )
    return out


def _fwd(base_logits, logits, keep, backend):
    if backend == "cpu" and _kernel_serves(base_logits, logits):
        return _kernel_fwd(base_logits, logits, keep)
    if backend == "triton":
        from ..kernels import kl_divergence as kernel

        return kernel.forward(base_logits, logits, keep)
    return _aten_fwd(base_logits, logits, keep)


def _bwd(grad, base_logits, logits, keep, lse_base, lse, backend):
    if backend == "cpu" and _kernel_serves(base_logits, logits):
        return _kernel_bwd(grad, base_logits, logits, keep, lse_base, lse)
    if backend == "triton":
        from ..kernels import kl_divergence as kernel

        return kernel.backward(grad, base_logits, logits, keep, lse_base, lse)
    return _aten_bwd(grad, base_logits, logits, keep, lse_base, lse)


def _fwd_fake(base_logits, logits, keep, backend):
    return tuple(logits.new_empty(keep.shape, dtype=_kind(logits)) for _ in range(3))


_common.define(
    "kl_divergence_fwd(Tensor base_logits, Tensor logits, Tensor keep, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _fwd,
    _fwd_fake,
)
_common.define(
    "kl_divergence_bwd(Tensor grad, Tensor base_logits, Tensor logits, Tensor keep, Tensor lse_base, "
    "Tensor lse, str backend) -> Tensor",
    _bwd,
    lambda grad, base_logits, logits, keep, lse_base, lse, backend: logits.new_empty(logits.shape),
)
