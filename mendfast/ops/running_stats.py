"""Running mean and squared deviations of token rows."""

from __future__ import annotations

import torch

from .. import backends
from ..reference.running_stats import running_stats_ as _reference
from . import _common
from ._cpu_extension import direct, row_stride

try:
    from .. import _cpu
except ImportError:  # then the backend is never chosen
    _cpu = None


def running_stats_(
    count: torch.Tensor,  # one element, any real dtype
    mean: torch.Tensor,  # [d]
    m2: torch.Tensor,  # [d]
    rows: torch.Tensor,  # [N, d]
    mask: torch.Tensor | None = None,  # [N], nonzero = counted
    *,
    backend: str | None = None,
) -> None:
    """Add ``rows`` to ``count``, ``mean`` and ``m2`` (the sum of squared deviations), in place.

    The whole chunk is merged at once (Chan, Golub and LeVeque 1979)::

        mean += (mean_b - mean) n_b / (n + n_b);    m2 += m2_b + (mean_b - mean)^2 n n_b / (n + n_b)

    The variance is ``m2 / (count - 1)``. Rows whose mask is zero are left out, whatever they hold.
    Raises ValueError for shapes that don't fit and if the mask leaves no row (seen on the CPU, or in
    ``with checking():``; elsewhere nothing changes then), TypeError for a dtype that isn't served.
    """
    if not torch.compiler.is_compiling() and direct("running_stats_", backend, count, mean, m2, rows):
        fits = rows.dim() == 2 and len(rows) and mean.shape == m2.shape == rows.shape[1:] and count.numel() == 1
        if fits and mask is None and _kernel_serves(count, mean, m2, rows, mask):
            return _kernel(count, mean, m2, rows, mask)
    _check(count, mean, m2, rows, mask)
    chosen = backends.choose("running_stats_", rows.device, backend, (rows.dtype, mean.dtype, m2.dtype))
    if chosen == "reference":
        _check_values(rows, mask)
        return _reference(count, mean, m2, rows, mask)
    torch.ops.mendfast.running_stats_(count, mean, m2, rows.detach(), mask, chosen)


def _check(count, mean, m2, rows, mask) -> None:
    if rows.dim() != 2 or mean.shape != rows.shape[1:] or m2.shape != rows.shape[1:]:
        raise ValueError(
            f"running_stats_: rows must be [N, d] and mean, m2 [d]; got {tuple(rows.shape)}, "
            f"{tuple(mean.shape)}, {tuple(m2.shape)}."
        )
    if count.numel() != 1:
        raise ValueError(f"running_stats_: count must hold one number; got shape {tuple(count.shape)}.")
    if mask is not None and mask.shape != rows.shape[:1]:
        raise ValueError(f"running_stats_: mask must be [{rows.shape[0]}]; got {tuple(mask.shape)}.")
    if rows.dtype not in _common.ROW_DTYPES:
        raise TypeError(f"running_stats_: rows are {rows.dtype}; use float32, bfloat16 or float16.")
    for name, value in (("mean", mean), ("m2", m2)):
        if value.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"running_stats_: {name} is {value.dtype}; keep it in float32 or float64.")
    if rows.shape[0] == 0:
        raise ValueError("running_stats_: there are no rows; check the labels and the mask.")
    _common.same_device("running_stats_", rows=rows, mean=mean, m2=m2, count=count, mask=mask)


def _check_values(rows, mask) -> None:
    if mask is not None and _common.checks_values(rows) and not bool(mask.any()):
        raise ValueError(
            f"running_stats_: the mask leaves none of the {rows.shape[0]} rows; check the labels."
        )


def _aten(count, mean, m2, rows, mask) -> None:
    # float64 throughout: the deviations of a chunk survive a mean 1e8 times as large, and on the CPU the
    # conversion is cheap beside the products that follow
    n_a = count.reshape(()).double()
    rows = rows.double()
    if mask is None:
        n_b = rows.shape[0]
        mean_b = rows.mean(0)
        deviations = rows - mean_b
    else:
        kept = (mask != 0).unsqueeze(1)
        n_b = kept.sum().double()
        mean_b = rows.where(kept, 0).sum(0) / n_b.clamp(min=1)
        deviations = (rows - mean_b).where(kept, 0)
    m2_b = deviations.square_().sum(0)
    weight = n_b / (n_a + n_b).clamp(min=1)
    difference = mean_b - mean
    # out of place first, so that an error above leaves all three as they were
    new_mean = torch.addcmul(mean.double(), difference, weight)
    new_m2 = m2.double() + m2_b + difference.square_() * (n_a * weight)
    mean.copy_(new_mean)
    m2.copy_(new_m2)
    count.add_(n_b) if isinstance(n_b, int) else count.add_(n_b.to(count.dtype))


def _kernel_serves(count, mean, m2, rows, mask) -> bool:
    return (
        rows.is_cpu
        and rows.dtype == torch.float32
        and mean.dtype == m2.dtype
        and mean.dtype in (torch.float32, torch.float64)
        and mean.is_contiguous()
        and m2.is_contiguous()
        and (rows.is_contiguous() or rows.stride(1) == 1 and row_stride(rows) >= rows.shape[1])
    )


def _kernel(count, mean, m2, rows, mask) -> None:
    if mask is not None:
        mask = (mask if mask.dtype == torch.bool else mask != 0).contiguous()
    before = float(count)
    kept = _cpu.running_stats(
        rows.data_ptr(),
        row_stride(rows),
        0 if mask is None else mask.data_ptr(),
        mean.data_ptr(),
        m2.data_ptr(),
        before,
        *rows.shape,
        mean.dtype == torch.float64,
        torch.get_num_threads(),
    )
    if kept == 0:
        _check_values(rows, mask)
    if not mean.is_inference() and not m2.is_inference():
        torch.autograd.graph.increment_version((mean, m2))
    count.fill_(before + kept)  # takes half as long as to add


def _impl(count, mean, m2, rows, mask, backend) -> None:
    if backend == "cpu" and _kernel_serves(count, mean, m2, rows, mask):
        return _kernel(count, mean, m2, rows, mask)
    _check_values(rows, mask)
    if backend == "triton":
        from ..kernels import running_stats as kernel

        return kernel.running_stats_(count, mean, m2, rows, mask)
    return _aten(count, mean, m2, rows, mask)


_common.define(
    "running_stats_(Tensor(a!) count, Tensor(b!) mean, Tensor(c!) m2, Tensor rows, Tensor? mask, "
    "str backend) -> ()",
    _impl,
    lambda count, mean, m2, rows, mask, backend: None,
)
