"""Products with 16-bit weights on CPUs that have no units for them: a part at a time is widened to float32.

Such a CPU's library multiplies 16-bit matrices at a fraction of float32's speed. The weights stay as they are; what is
widened of them fits the processor's cache, is multiplied there, and makes room for the next part. Sums are in float32,
and rounded once where the other factor is in 16 bits too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from . import few_rows

PART = 1 << 18
"""Weights that are widened at a time: 1 MiB."""
LEAST_ROWS = 2
"""Below, widening takes longer than a product in 16 bits."""
LEAST_WEIGHTS = 1 << 16
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
        and (wide or x.dtype == w.dtype and len(x) >= LEAST_ROWS and w.numel() >= LEAST_WEIGHTS)
        and x.device.type == w.device.type == "cpu"
        and x.dim() == w.dim() == 2
        and x.shape[1] == w.shape[0]
        and (bias is None or bias.dtype == w.dtype and bias.device == x.device and bias.shape == w.shape[1:])
        and not has_units(w.dtype)
    )


def mm(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ w + bias`` of 16-bit w [K, M], bias [M] and x [N, K], of their dtype or float32: [N, M] of x's dtype.
    Not differentiable."""
    wide, (depth, cols) = x.float(), w.shape
    y = x.new_empty(len(x), cols)
    width, product = max(1, PART // depth), _product(len(x))
    part = _place(w, depth, min(width, cols))
    for start in range(0, cols, width):
        stop = min(start + width, cols)
        found = product(wide, part[:, : stop - start].copy_(w[:, start:stop]))
        y[:, start:stop] = found if bias is None else found.add_(bias[start:stop])
    return y


def mm_transposed(grad: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """``grad @ w.T`` of 16-bit w [K, M] and grad [N, M], of its dtype or float32: [N, K] of grad's dtype."""
    depth, cols = w.shape
    width, product = max(1, PART // depth), _product(len(grad))
    wide, y = grad.float(), torch.zeros(len(grad), depth)
    part = _place(w, depth, min(width, cols))
    for start in range(0, cols, width):
        stop = min(start + width, cols)
        y += product(wide[:, start:stop], part[:, : stop - start].copy_(w[:, start:stop]).T)
    return y.to(grad.dtype)


def _product(rows: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    few = rows <= few_rows.MOST_ROWS and few_rows.problem() is None
    return few_rows.kernel_mm if few else torch.mm


def _place(w: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """Room for columns of ``w``, laid out as they are there."""
    return torch.empty(cols, rows).T if w.stride(0) == 1 else torch.empty(rows, cols)
