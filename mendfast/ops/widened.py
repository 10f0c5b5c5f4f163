"""Products with 16-bit weights in float32: of few rows, and of all on CPUs that have no units for 16 bits.

The library of such a CPU multiplies 16-bit matrices at a fraction of float32's speed. The weights stay as they are:
with few rows the kernel widens what it reads (:mod:`mendfast.ops.few_rows`), with many a part that fits the processor's
cache is widened, multiplied there, and makes room for the next. Sums are rounded once where the other factor is in 16
bits too.
"""

from __future__ import annotations

import functools

import torch

from . import few_rows
from ._cpu_extension import instructions

PART = 1 << 18
"""Weights that are widened at a time: 1 MiB."""
LEAST_ROWS = 2
"""Below, a product in 16 bits takes no longer than one part by part."""
LEAST_WEIGHTS = 1 << 16
MOST_BESIDE_UNITS = 16
"""From about as many on units for 16 bits are faster than AVX-512's for 32."""
UNITS = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}


@functools.cache
def has_units(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of that dtype itself."""
    found: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return dtype not in UNITS or any(found.get(name) for name in UNITS[dtype])


def served(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether a product ``x @ w + bias`` is better made so; what is wrong is left to PyTorch to refuse."""
    wide = x.dtype == torch.float32
    return (
        w.dtype in UNITS
        and (wide or x.dtype == w.dtype and w.numel() >= LEAST_WEIGHTS)
        and x.device.type == w.device.type == "cpu"
        and x.dim() == w.dim() == 2
        and x.shape[1] == w.shape[0]
        and (bias is None or bias.dtype == w.dtype and bias.device == x.device and bias.shape == w.shape[1:])
        and (_few(x, w) or not has_units(w.dtype) and (wide or len(x) >= LEAST_ROWS))
    )


def mm(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ w + bias`` of 16-bit w [K, M], bias [M] and x [N, K], of their dtype or float32: [N, M] of x's dtype.
    Not differentiable."""
    wide, (depth, cols) = x.float(), w.shape
    if _few(x, w):
        return few_rows.kernel_mm(wide, w, bias).to(x.dtype)
    y, width = x.new_empty(len(x), cols), max(1, PART // depth)
    part = _place(w, depth, min(width, cols))
    for start in range(0, cols, width):
        stop = min(start + width, cols)
        found = torch.mm(wide, part[:, : stop - start].copy_(w[:, start:stop]))
        y[:, start:stop] = found if bias is None else found.add_(bias[start:stop])
    return y


def mm_transposed(grad: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """``grad @ w.T`` of 16-bit w [K, M] and grad [N, M], of its dtype or float32: [N, K] of grad's dtype."""
    wide, (depth, cols) = grad.float(), w.shape
    if _few(grad, w):
        return few_rows.kernel_mm(wide, w.T).to(grad.dtype)
    y, width = torch.zeros(len(grad), depth), max(1, PART // depth)
    part = _place(w, depth, min(width, cols))
    for start in range(0, cols, width):
        stop = min(start + width, cols)
        y.addmm_(wide[:, start:stop], part[:, : stop - start].copy_(w[:, start:stop]).T)
    return y.to(grad.dtype)


def _few(x: torch.Tensor, w: torch.Tensor) -> bool:
    """Whether the kernel is the faster one."""
    if not few_rows.has_lines(w) or few_rows.problem() is not None:
        return False
    if not has_units(w.dtype):
        return len(x) <= few_rows.MOST_ROWS
    return len(x) <= MOST_BESIDE_UNITS and instructions() == "avx512"


def _place(w: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """Room for columns of ``w``, laid out as they are there."""
    return torch.empty(cols, rows).T if w.stride(0) == 1 else torch.empty(rows, cols)
