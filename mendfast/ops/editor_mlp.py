"""The editor network over stacked rows: checks, choice of backend, autograd.

Kept for the backward pass, per block: the products t = V x (N x R) and w = U t + b (N x D), and from the
second block on its input x (N x D). Making w anew would read U once more, D x R numbers; keeping it costs N x
D, which is less whenever N < R. The first block's input is made anew from the rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch.autograd.function import once_differentiable

from .. import backends
from ..kernels._library import matmul
from ..reference.editor_mlp import editor_mlp as _reference
from ..types import EPS, PRECISIONS, Block, Stats
from . import _common, few_rows


def editor_mlp(
    u: torch.Tensor,  # [N, m]
    delta: torch.Tensor,  # [N, n]
    stats: Stats | None,
    blocks: Sequence[Block],
    mode: torch.Tensor | None = None,  # [N] int
    *,
    precision: str = "tf32x3",
    residual: bool = True,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise, concatenate, run the low-rank blocks, split (Mitchell et al. 2022, eq. 3a, 3b)::

        z = [(u - mu_u) / (sigma_u + 1e-7) ; (delta - mu_delta) / (sigma_delta + 1e-7)]
        z = z + max(0, s[mode] * (U V z + b) + o[mode])        for each block

    ``stats`` None: no normalisation. No blocks: the normalised rows. A side of width 0 is absent.
    ``residual=False`` leaves out "z +". Rows are float32, bfloat16 or float16 (float64 outside Triton);
    parameters float32 or bfloat16. Computed in float32 at least, returned in the rows' dtypes.
    ``precision`` says how matrix units may multiply: "tf32x3", "ieee" or "tf32"; the CPU has one way.
    Gradients reach every parameter, and u and delta if they ask; once differentiable.

    Raises ValueError for widths that don't fit, no rows, a mode out of range, non-finite statistics;
    TypeError for a dtype that isn't served. Values on a GPU are looked at only in ``with checking():``.
    """
    blocks = [block if isinstance(block, Block) else Block(*block) for block in blocks]
    _check(u, delta, stats, blocks, mode, precision)
    flat = [p for block in blocks for p in block if p is not None]
    chosen = backends.choose("editor_mlp", u.device, backend, [x.dtype for x in (u, delta, *flat)])
    if chosen == "reference":
        _check_values(u, stats or (), [block.s for block in blocks if block.s is not None], mode)
        return _reference(u, delta, stats, blocks, mode, precision=precision, residual=residual)
    scaled = len(blocks) > 0 and blocks[0].s is not None
    shifted = len(blocks) > 0 and blocks[0].o is not None
    config = (len(blocks), scaled, shifted, len(stats or ()), precision, residual, chosen)
    if torch.is_grad_enabled() and (
        u.requires_grad or delta.requires_grad or any(p.requires_grad for p in flat)
    ):
        return _EditorMLP.apply(config, mode, u, delta, *(stats or ()), *flat)
    out = torch.ops.mendfast.editor_mlp_fwd(
        u,
        delta,
        list(stats or ()),
        flat,
        mode,
        len(blocks),
        scaled,
        shifted,
        precision,
        residual,
        False,
        chosen,
    )
    return out[0], out[1]


class _EditorMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, config, mode, u, delta, *tensors):
        count, scaled, shifted, n_stats, precision, residual, chosen = config
        stats, params = list(tensors[:n_stats]), list(tensors[n_stats:])
        out_u, out_delta, *saved = torch.ops.mendfast.editor_mlp_fwd(
            u, delta, stats, params, mode, count, scaled, shifted, precision, residual, True, chosen
        )
        ctx.config = config
        ctx.has_mode = mode is not None
        ctx.save_for_backward(*([mode] if ctx.has_mode else []), u, delta, *tensors, *saved)
        return out_u, out_delta

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_u, grad_delta):
        count, scaled, shifted, n_stats, precision, residual, chosen = ctx.config
        tensors = list(ctx.saved_tensors)
        mode = tensors.pop(0) if ctx.has_mode else None
        u, delta = tensors[:2]
        stats = tensors[2 : 2 + n_stats]
        n_params = count * (3 + scaled + shifted)
        params = tensors[2 + n_stats : 2 + n_stats + n_params]
        saved = tensors[2 + n_stats + n_params :]
        needs_rows = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        grads = torch.ops.mendfast.editor_mlp_bwd(
            grad_u, grad_delta, u, delta, stats, params, saved, mode,
            count, scaled, shifted, precision, residual, needs_rows, chosen,
        )  # fmt: skip
        rows = list(grads[n_params:]) if needs_rows else [None, None]
        rows = [g if needed else None for g, needed in zip(rows, ctx.needs_input_grad[2:4], strict=True)]
        return None, None, *rows, *[None] * n_stats, *grads[:n_params]


def _check(u, delta, stats, blocks, mode, precision) -> None:
    """Everything that shapes and dtypes can tell."""
    if precision not in PRECISIONS:
        raise ValueError(
            f"editor_mlp: precision {precision!r} is unknown; use {', '.join(PRECISIONS)}."
        )
    if u.dim() != 2 or delta.dim() != 2 or u.shape[0] != delta.shape[0]:
        raise ValueError(
            f"editor_mlp: u and delta must be [N, m] and [N, n] with one N; got {tuple(u.shape)} "
            f"and {tuple(delta.shape)}. Flatten the batch and stack the layers' rows first."
        )
    if u.shape[0] == 0:
        raise ValueError("editor_mlp: there are no rows left to edit with; check the mask and the labels.")
    for name, rows in (("u", u), ("delta", delta)):
        if rows.dtype not in _common.ROW_DTYPES:
            raise TypeError(f"editor_mlp: {name} is {rows.dtype}; use float32, bfloat16 or float16 rows.")
    if u.device != delta.device:
        raise ValueError(
            f"editor_mlp: u is on {u.device} and delta on {delta.device}; move them to one device."
        )
    m, n = u.shape[1], delta.shape[1]
    if stats is not None:
        for name, value, width in zip(
            ("u_mean", "u_std", "delta_mean", "delta_std"), stats, (m, m, n, n), strict=True
        ):
            if value.shape != (width,):
                raise ValueError(
                    f"editor_mlp: stats.{name} has shape {tuple(value.shape)}; the rows are {width} wide: "
                    "use the statistics of this layer's shape."
                )
    scaled = len(blocks) > 0 and blocks[0].s is not None
    shifted = len(blocks) > 0 and blocks[0].o is not None
    modes = None
    for i, block in enumerate(blocks):
        rank = block.V.shape[0]
        expected = {"U": (m + n, rank), "V": (rank, m + n), "b": (m + n,)}
        for name, shape in expected.items():
            value = getattr(block, name)
            if value.shape != shape:
                raise ValueError(
                    f"editor_mlp: blocks[{i}].{name} has shape {tuple(value.shape)}; rows of width "
                    f"{m} + {n} need {shape}."
                )
            if not value.dtype.is_floating_point or value.dtype == torch.float16:
                raise TypeError(f"editor_mlp: blocks[{i}].{name} is {value.dtype}; use float32 or bfloat16.")
        if (block.s is not None) != scaled or (block.o is not None) != shifted:
            raise ValueError(
                f"editor_mlp: blocks[{i}] differs from blocks[0] in having s or o; give all or none."
            )
        for name in ("s", "o"):
            value = getattr(block, name)
            if value is None:
                continue
            modes = value.shape[0] if modes is None else modes
            if value.dim() != 2 or value.shape != (modes, m + n):
                raise ValueError(
                    f"editor_mlp: blocks[{i}].{name} has shape {tuple(value.shape)}; it must be "
                    f"[modes, {m + n}], with one number of modes throughout."
                )
    if modes is not None:
        if mode is None:
            raise ValueError(
                f"editor_mlp: s or o is given for {modes} modes, so mode [N] is needed, one per row."
            )
        if mode.shape != u.shape[:1] or mode.dtype.is_floating_point or mode.dtype == torch.bool:
            raise ValueError(
                f"editor_mlp: mode must be integers, [{u.shape[0]}]; got {mode.dtype} {tuple(mode.shape)}."
            )


def _check_values(u, stats, scales, mode) -> None:
    """What only the values can tell."""
    if not _common.checks_values(u):
        return
    if len(stats) and not math.isfinite(sum(float(s.sum()) for s in stats)):
        names = ("u_mean", "u_std", "delta_mean", "delta_std")
        bad = [n for n, s in zip(names, stats, strict=True) if not bool(_common.all_finite(s))]
        if bad:
            raise ValueError(
                f"editor_mlp: the statistics {', '.join(bad)} are not finite; they need at least two "
                "rows of finite gradients: train for a step first, or load a trained editor."
            )
    if mode is not None and scales:
        low, high = (int(v) for v in torch.aminmax(mode))
        if low < 0 or high >= scales[0].shape[0]:
            raise ValueError(
                f"editor_mlp: mode goes from {low} to {high}, and the editor has the modes 0 to "
                f"{scales[0].shape[0] - 1}; a mode is the layer's index among those of its shape."
            )


def _unflatten(params, count, scaled, shifted) -> list[Block]:
    it = iter(params)
    return [
        Block(next(it), next(it), next(it), next(it) if scaled else None, next(it) if shifted else None)
        for _ in range(count)
    ]


def _kind(u, params) -> torch.dtype:
    kind = torch.promote_types(u.dtype, torch.float32)
    return torch.promote_types(kind, params[0].dtype) if params else kind


def _normalise(u, delta, stats, kind) -> torch.Tensor:
    z = torch.cat([u.to(kind), delta.to(kind)], dim=1)
    if stats:
        u_mean, _, delta_mean, _ = stats
        z.sub_(torch.cat([u_mean, delta_mean])).div_(_deviations(stats, kind))
    return z


def _deviations(stats, kind) -> torch.Tensor:
    """sigma + 1e-7 of both sides, the sum in the type that divides by it."""
    return torch.cat([stats[1], stats[3]]).to(kind, copy=True).add_(EPS)


def _parts(mode, n_rows) -> list[tuple]:
    """Runs of rows with one mode, as (mode, start, end); else one part whose mode is the tensor.

    Rows come stacked layer by layer. A run broadcasts its s and o, and needs no copy of them per row.
    """
    if mode is None:
        return [(0, 0, n_rows)]
    if mode.device.type == "cpu":
        values, counts = torch.unique_consecutive(mode, return_counts=True)
        if 8 * values.shape[0] <= n_rows:
            ends = counts.cumsum(0).tolist()
            return list(zip(values.tolist(), [0, *ends], ends, strict=False))
    return [(mode, 0, n_rows)]


def _of(table, index) -> torch.Tensor:
    return table.index_select(0, index) if torch.is_tensor(index) else table[index]


def _affine(w, s, o, parts) -> torch.Tensor:
    """s[mode] * w + o[mode], where absent s is 1 and absent o is 0."""
    if s is None and o is None:
        return w
    out = torch.empty_like(w)
    for index, start, end in parts:
        rows, target = w[start:end], out[start:end]
        if s is None:
            torch.add(rows, _of(o, index), out=target)
        elif o is None:
            torch.mul(rows, _of(s, index), out=target)
        else:
            torch.addcmul(_of(o, index), rows, _of(s, index), out=target)
    return out


def _sum_by_mode(rows, parts, modes, product) -> torch.Tensor:
    """[N, D] -> [modes, D]; mixed modes by a product with a one-hot matrix, fast and deterministic."""
    if torch.is_tensor(parts[0][0]):
        mode = parts[0][0]
        one_hot = mode == torch.arange(modes, device=mode.device, dtype=mode.dtype).unsqueeze(1)
        return product(one_hot.to(rows.dtype), rows)
    out = rows.new_zeros(modes, rows.shape[1])
    for index, start, end in parts:
        out[index].add_(rows[start:end].sum(0))
    return out


def _widened(block, kind) -> Block:
    return Block(*(None if p is None else p.to(kind) for p in block))


def _library_fwd(u, delta, stats, blocks, mode, *, residual, keep, mm) -> list[torch.Tensor]:
    kind = _kind(u, blocks[0] if blocks else ())
    x = _normalise(u, delta, stats, kind)
    parts = _parts(mode, u.shape[0])
    saved = []
    for block in blocks:
        U, V, b, s, o = _widened(block, kind)
        t = mm(x, V.T)
        w = mm(t, U.T, b)
        pre = _affine(w, s, o, parts)
        act = pre.clamp(min=0) if pre is w else pre.clamp_(min=0)
        if keep:
            saved += [x, t, w] if saved else [t, w]
        x = act.add_(x) if residual else act
    m = u.shape[1]
    return [x[:, :m].to(u.dtype, copy=True), x[:, m:].to(delta.dtype, copy=True), *saved]


def _library_bwd(grad_u, grad_delta, u, delta, stats, blocks, saved, mode, *, residual, needs_rows, mm, product):
    kind = _kind(u, blocks[0] if blocks else ())
    grad = torch.cat([grad_u.to(kind), grad_delta.to(kind)], dim=1)
    parts = _parts(mode, u.shape[0])
    grads: list[list[torch.Tensor]] = []
    for i in reversed(range(len(blocks))):
        U, V, _, s, o = _widened(blocks[i], kind)
        x, t, w = saved[3 * i - 1 : 3 * i + 2] if i else (_normalise(u, delta, stats, kind), *saved[:2])
        pre = _affine(w, s, o, parts)
        gated = torch.ge(pre, 0, out=torch.empty_like(w)).mul_(grad)
        d_w = gated if s is None else _affine(gated, s, None, parts)
        d_t = mm(d_w, U)
        own = [product(d_w.T, t), product(d_t.T, x), d_w.sum(0)]  # equations 10, 11
        if s is not None:
            own.append(_sum_by_mode(gated * w, parts, s.shape[0], product))
        if o is not None:
            own.append(_sum_by_mode(gated, parts, o.shape[0], product))
        grads.insert(0, own)
        if i or needs_rows:
            d_x = mm(d_t, V)
            grad = d_x.add_(grad) if residual else d_x
    out = []
    for own, block in zip(grads, blocks, strict=True):
        out += [g.to(p.dtype) for g, p in zip(own, (p for p in block if p is not None), strict=True)]
    if needs_rows:
        if stats:
            grad = grad / _deviations(stats, kind)
        m = u.shape[1]
        out += [grad[:, :m].to(u.dtype, copy=True), grad[:, m:].to(delta.dtype, copy=True)]
    return out


def _products(backend: str, precision: str) -> tuple:
    """(x @ w + bias, a @ b): by what is fastest on the CPU, or by the library."""
    if backend == "cpu":
        return few_rows.mm, few_rows.library_mm
    product = functools.partial(matmul, precision=precision)
    return functools.partial(few_rows.library_mm, product=product), product


def _fwd(u, delta, stats, params, mode, count, scaled, shifted, precision, residual, keep, backend):
    blocks = _unflatten(params, count, scaled, shifted)
    _check_values(u, stats, [t for block in blocks[:1] for t in block[3:] if t is not None], mode)
    with _common.full_precision(u.device):
        if backend == "triton":
            from ..kernels import editor_mlp as kernel

            return kernel.forward(
                u, delta, stats, blocks, mode, precision=precision, residual=residual, keep=keep
            )
        mm, _ = _products(backend, precision)
        return _library_fwd(u, delta, stats, blocks, mode, residual=residual, keep=keep, mm=mm)


def _bwd(grad_u, grad_delta, u, delta, stats, params, saved, mode, count, scaled, shifted, precision,
         residual, needs_rows, backend):  # fmt: skip
    blocks = _unflatten(params, count, scaled, shifted)
    with _common.full_precision(u.device):
        if backend == "triton":
            from ..kernels import editor_mlp as kernel

            return kernel.backward(
                (grad_u, grad_delta), (u, delta), stats, blocks, saved, mode,
                precision=precision, residual=residual, needs_rows=needs_rows,
            )  # fmt: skip
        mm, product = _products(backend, precision)
        return _library_bwd(
            grad_u, grad_delta, u, delta, stats, blocks, saved, mode,
            residual=residual, needs_rows=needs_rows, mm=mm, product=product,
        )  # fmt: skip


def _fwd_fake(u, delta, stats, params, mode, count, scaled, shifted, precision, residual, keep, backend):
    out = [u.new_empty(u.shape), delta.new_empty(delta.shape)]
    if keep:
        width = u.shape[1] + delta.shape[1]
        kind = _kind(u, params)
        for block in _unflatten(params, count, scaled, shifted):
            widths = (width, block.V.shape[0], width)[len(out) == 2 :]  # the first block has no x
            out += [u.new_empty((u.shape[0], w), dtype=kind) for w in widths]
    return out


def _bwd_fake(grad_u, grad_delta, u, delta, stats, params, saved, mode, count, scaled, shifted, precision,
              residual, needs_rows, backend):  # fmt: skip
    out = [p.new_empty(p.shape) for p in params]
    return out + [u.new_empty(u.shape), delta.new_empty(delta.shape)] if needs_rows else out


_common.define(
    "editor_mlp_fwd(Tensor u, Tensor delta, Tensor[] stats, Tensor[] params, Tensor? mode, int count, "
    "bool scaled, bool shifted, str precision, bool residual, bool keep, str backend) -> Tensor[]",
    _fwd,
    _fwd_fake,
)
_common.define(
    "editor_mlp_bwd(Tensor grad_u, Tensor grad_delta, Tensor u, Tensor delta, Tensor[] stats, "
    "Tensor[] params, Tensor[] saved, Tensor? mode, int count, bool scaled, bool shifted, "
    "str precision, bool residual, bool needs_rows, str backend) -> Tensor[]",
    _bwd,
    _bwd_fake,
)
