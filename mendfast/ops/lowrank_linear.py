"""A linear layer's output under a low-rank update of its weight: checks, choice of backend, autograd."""

from __future__ import annotations

import math

import torch
from torch.autograd.function import once_differentiable

from .. import backends
from ..reference.lowrank_linear import lowrank_linear as _reference
from . import _common, few_rows
from ._cpu_extension import kind_of, row_major, row_stride
from .rank1_update import MOST_TERMS


def lowrank_linear(
    y: torch.Tensor,  # [B, S, n], or [..., n] with shared factors
    x: torch.Tensor,  # [B, S, m], or [..., m]
    u: torch.Tensor,  # [B, T, m] each sample its own, or [T, m] one for all
    delta: torch.Tensor,  # [B, T, n], or [T, n]
    alpha: torch.Tensor | float,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """``y - alpha (x u^T) delta``: what the layer gives with W - alpha delta^T u, where y = W x (+ bias).

    Products in float32 (autocast doesn't reach them), returned in y's dtype. No m x n tensor is made, but where so
    many rows T meet that delta^T u takes fewer operations (many edits at once). Between the passes x is held as it
    came, with the S x T coefficients. Gradients for y, x, u, delta and alpha, each
    only if asked; once differentiable. Raises ValueError for shapes that don't fit, TypeError for dtypes.
    """
    _check(y, x, u, delta, alpha)
    chosen = backends.choose("lowrank_linear", y.device, backend, [t.dtype for t in (y, x, u, delta)])
    if chosen == "reference":
        return _reference(y, x, u, delta, alpha)
    factor, scale = (alpha, 1.0) if isinstance(alpha, torch.Tensor) else (None, float(alpha))
    return _LowRankLinear.apply(y, x, u, delta, factor, scale, chosen)


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, x, u, delta, alpha, scale, chosen):
        out, c = torch.ops.mendfast.lowrank_linear_fwd(y, x, u, delta, alpha, scale, chosen)
        ctx.args = (scale, chosen, alpha is None)
        ctx.save_for_backward(x, u, delta, c, *([] if alpha is None else [alpha]))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        scale, chosen, constant = ctx.args
        x, u, delta, c, *rest = ctx.saved_tensors
        needs = list(ctx.needs_input_grad)
        wanted = needs[1:5]
        if not any(wanted):
            return grad, None, None, None, None, None, None
        grads = torch.ops.mendfast.lowrank_linear_bwd(
            grad, x, u, delta, c, None if constant else rest[0], scale, *wanted, chosen
        )
        it = iter(grads)
        return grad if needs[0] else None, *(next(it) if w else None for w in wanted), None, None


def _check(y, x, u, delta, alpha) -> None:
    shapes = f"y {tuple(y.shape)}, x {tuple(x.shape)}, u {tuple(u.shape)}, delta {tuple(delta.shape)}"
    if u.dim() not in (2, 3) or delta.dim() != u.dim() or u.shape[:-1] != delta.shape[:-1]:
        raise ValueError(
            f"lowrank_linear: u and delta must be [T, m], [T, n] or [B, T, m], [B, T, n]; got {shapes}."
        )
    if y.dim() != x.dim() or y.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"lowrank_linear: y and x must agree in all but the last dimension; got {shapes}.")
    if x.shape[-1] != u.shape[-1] or y.shape[-1] != delta.shape[-1]:
        raise ValueError(f"lowrank_linear: x and u must be equally wide, and y and delta; got {shapes}.")
    if u.dim() == 3 and (x.dim() != 3 or x.shape[0] != u.shape[0]):
        raise ValueError(
            f"lowrank_linear: factors per sample need x [B, S, m] with the same B; got {shapes}."
        )
    for name, value in (("y", y), ("x", x), ("u", u), ("delta", delta)):
        if value.dtype not in _common.ROW_DTYPES:
            raise TypeError(f"lowrank_linear: {name} is {value.dtype}; use float32, bfloat16 or float16.")
    if isinstance(alpha, torch.Tensor) and alpha.numel() != 1:
        raise ValueError(f"lowrank_linear: alpha must be one number; got shape {tuple(alpha.shape)}.")
    _common.same_device("lowrank_linear", y=y, x=x, u=u, delta=delta)


def _kind(*tensors) -> torch.dtype:
    kind = torch.float32
    for tensor in tensors:
        kind = torch.promote_types(kind, tensor.dtype)
    return kind


def _flat(tensor, batched):
    """Rows as [B, S, .] for factors per sample, as [rows, .] for shared ones."""
    return tensor if batched else tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def fewer_through_weight(x: torch.Tensor, u: torch.Tensor, n: int) -> bool:
    """Whether x (delta^T u)^T takes fewer operations than (x u^T) delta; of factors per sample for each of them."""
    t, m = u.shape[-2:]
    rows = x.shape[-2] if u.dim() == 3 else math.prod(x.shape[:-1])
    return (rows + t) * m * n < rows * t * (m + n)


def _aten_fwd(y, x, u, delta, alpha, scale):
    kind = _kind(y, u)
    batched = u.dim() == 3
    if fewer_through_weight(x, u, delta.shape[-1]):
        by = -scale if alpha is None else alpha.to(kind).neg()
        weight = (delta.to(kind) * by).mT @ u.to(kind)
        add = torch.baddbmm if batched else torch.addmm
        out = add(_flat(y, batched).to(kind), _flat(x, batched).to(kind), weight.mT)
        return out.to(y.dtype).reshape(y.shape), u.new_empty((*x.shape[:-1], 0), dtype=kind)
    c = _flat(x, batched).to(kind) @ u.to(kind).mT
    by = -scale if alpha is None else alpha.to(kind).neg()
    add = torch.baddbmm if batched else torch.addmm
    out = add(_flat(y, batched).to(kind), c * by, delta.to(kind))
    # no view: autograd forbids a model to add to one in place (Falcon does)
    return torch.ops.aten._unsafe_view(out.to(y.dtype), y.shape), c.reshape(*x.shape[:-1], u.shape[-2])


def _kernel_serves(y, x, u, delta) -> bool:
    some = y.numel() > 0 and x.numel() > 0 and 0 < u.shape[-2] <= MOST_TERMS.get(y.dtype, 0)
    if not some or y.device.type != "cpu" or u.dtype == torch.float64:
        return False
    return not fewer_through_weight(x, u, delta.shape[-1])


def _kernel_fwd(y, x, u, delta, alpha, scale):
    """The second product beside y, and what it is taken from, in one pass over the result."""
    from .. import _cpu

    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    scale = scale if alpha is None else float(alpha)
    all_of = (y, out, x, u, delta)
    samples = zip(*all_of, strict=True) if u.dim() == 3 else [all_of]
    given, held, coefficients = [], [], []
    for from_, to, rows, left, right in samples:
        from_, to, right = row_major(_flat(from_, False)), _flat(to, False), row_major(right.float())
        c = few_rows.mm(left.float(), row_major(_flat(rows, False).float()).T)  # [T, rows]: few of them
        held += [from_, right]  # until they are read
        coefficients.append(c)
        pointers = (tensor.data_ptr() for tensor in (from_, to, c, right))
        strides = row_stride(from_), row_stride(to), row_stride(c), 1, row_stride(right)
        given.append((*pointers, *strides, *to.shape, len(right), scale, 0))
    _cpu.outer_update(given, kind_of(y.dtype), False, False, False, torch.get_num_threads())
    return out, torch.stack(coefficients).mT.contiguous().view(*x.shape[:-1], u.shape[-2])


def _aten_bwd(grad, x, u, delta, c, alpha, scale, need_x, need_u, need_delta, need_alpha):
    kind = c.dtype
    batched = u.dim() == 3
    if fewer_through_weight(x, u, delta.shape[-1]):
        return _through_weight(grad, x, u, delta, alpha, scale, need_x, need_u, need_delta, need_alpha)
    g, c = _flat(grad, batched).to(kind), _flat(c, batched)
    by = -scale if alpha is None else alpha.to(kind).neg()
    out = []
    if need_x or need_u or need_alpha:
        e = g @ delta.to(kind).mT
        d_c = e * by
    if need_x:
        out.append((d_c @ u.to(kind)).to(x.dtype).reshape(x.shape))
    if need_u:
        out.append((d_c.mT @ _flat(x, batched).to(kind)).to(u.dtype))
    if need_delta:
        out.append(((c * by).mT @ g).to(delta.dtype))
    if need_alpha:
        out.append(-(c * e).sum().to(alpha.dtype).reshape(alpha.shape))
    return out


def _through_weight(grad, x, u, delta, alpha, scale, need_x, need_u, need_delta, need_alpha):
    kind = _kind(grad, u)
    batched = u.dim() == 3
    g, x_rows = _flat(grad, batched).to(kind), _flat(x, batched).to(kind)
    u_rows, d_rows = u.to(kind), delta.to(kind)
    by = -scale if alpha is None else alpha.to(kind).neg()
    out = []
    weight = d_rows.mT @ u_rows if need_x or need_alpha else None
    if need_x:
        out.append(((g * by) @ weight).to(x.dtype).reshape(x.shape))
    if need_u or need_delta or need_alpha:
        moved = g.mT @ x_rows  # the gradient of alpha delta^T u, but for the sign
    if need_u:
        out.append((d_rows @ moved * by).to(u.dtype))
    if need_delta:
        out.append((u_rows @ moved.mT * by).to(delta.dtype))
    if need_alpha:
        out.append(-(weight * moved).sum().to(alpha.dtype).reshape(alpha.shape))
    return out


def _fwd(y, x, u, delta, alpha, scale, backend):
    with _common.full_precision(y.device):
        if backend == "triton":
            from ..kernels import lowrank_linear as kernel

            return kernel.forward(y, x, u, delta, alpha=alpha, scale=scale)
        if backend == "cpu" and _kernel_serves(y, x, u, delta):
            return _kernel_fwd(y, x, u, delta, alpha, scale)
        return _aten_fwd(y, x, u, delta, alpha, scale)


def _bwd(grad, x, u, delta, c, alpha, scale, need_x, need_u, need_delta, need_alpha, backend):
    with _common.full_precision(grad.device):
        if backend == "triton":
            from ..kernels import lowrank_linear as kernel

            needs = kernel.Needs(need_x, need_u, need_delta, need_alpha)
            return kernel.backward(grad, x, u, delta, c, alpha=alpha, scale=scale, needs=needs)
        return _aten_bwd(grad, x, u, delta, c, alpha, scale, need_x, need_u, need_delta, need_alpha)


def _fwd_fake(y, x, u, delta, alpha, scale, backend):
    width = 0 if backend != "triton" and fewer_through_weight(x, u, delta.shape[-1]) else u.shape[-2]
    return y.new_empty(y.shape), x.new_empty((*x.shape[:-1], width), dtype=_kind(y, u))


def _bwd_fake(grad, x, u, delta, c, alpha, scale, need_x, need_u, need_delta, need_alpha, backend):
    wanted = ((x, need_x), (u, need_u), (delta, need_delta), (alpha, need_alpha))
    return [value.new_empty(value.shape) for value, needed in wanted if needed]


_common.define(
    "lowrank_linear_fwd(Tensor y, Tensor x, Tensor u, Tensor delta, Tensor? alpha, float scale, str backend) "
    "-> (Tensor, Tensor)",
    _fwd,
    _fwd_fake,
)
_common.define(
    "lowrank_linear_bwd(Tensor grad, Tensor x, Tensor u, Tensor delta, Tensor c, Tensor? alpha, float scale, "
    "bool need_x, bool need_u, bool need_delta, bool need_alpha, str backend) -> Tensor[]",
    _bwd,
    _bwd_fake,
)
