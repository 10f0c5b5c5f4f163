"""Products in 16 bits on CPUs that have no units for them: a part of the weights at a time is widened to float32.

Such a CPU's library multiplies 16-bit matrices at a fraction of float32's speed. The weights stay as they are; what is
widened of them fits the processor's cache, is multiplied there, and makes room for the next part. Sums are in float32
and rounded once.
"""

from __future__ import annotations

import functools

import torch

PART = 1 << 20
"""Weights that are widened at a time: 4 MiB."""
LEAST_ROWS = 8
"""Below, widening takes longer than the product."""
LEAST_WEIGHTS = 1 << 16
UNITS = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}


@functools.cache
def has_units(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of that dtype itself."""
    found: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return dtype not in UNITS or any(found.get(name) for name in UNITS[dtype])


def served(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether a product ``x @ w + bias`` is better made so; what is wrong is left to PyTorch to refuse."""
    return (
        x.dtype in UNITS
        and x.dtype == w.dtype
        and x.device.type == w.device.type == "cpu"
        and x.dim() == w.dim() == 2
        and x.shape[1] == w.shape[0]
        and len(x) >= LEAST_ROWS
        and w.numel() >= LEAST_WEIGHTS
        and (bias is None or bias.dtype == x.dtype and bias.device == x.device and bias.shape == w.shape[1:])
        and not has_units(x.dtype)
    )


def mm(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ w + bias`` of 16-bit x [N, K], w [K, M], bias [M]: [N, M] of their dtype. Not differentiable."""
    wide, (depth, cols) = x.float(), w.shape
    y = x.new_empty(len(x), cols)
    width = max(1, PART // depth)
    part = _place(w, depth, min(width, cols))
    for start in range(0, cols, width):
        stop = min(start + width, cols)
        product = torch.mm(wide, part[:, : stop - start].copy_(w[:, start:stop]))
        y[:, start:stop] = product if bias is None else product.add_(bias[start:stop])
    return y


def mm_transposed(grad: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """``grad @ w.T`` of 16-bit grad [N, M] and w [K, M]: [N, K] of their dtype."""
    depth, cols = w.shape
    width = max(1, PART // depth)
    y = torch.zeros(len(grad), depth)
    part = _place(w, depth, min(width, cols))
    for start in range(0, cols, width):
        stop = min(start + width, cols)
        y.addmm_(grad[:, start:stop].float(), part[:, : stop - start].copy_(w[:, start:stop]).T)
    return y.to(grad.dtype)


def _place(w: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """Room for columns of ``w``, laid out as they are there."""
    return torch.empty(cols, rows).T if w.stride(0) == 1 else torch.empty(rows, cols)
