"""Float32 products of more than a few rows on CPUs whose widest units PyTorch's own product leaves idle.

On x86 PyTorch multiplies float32 matrices by MKL, which uses AVX-512 on Intel's processors alone. oneDNN, which PyTorch
carries too and takes for 16 bits, uses it on all: on one core of an AMD EPYC of 2025 its products of 64 rows and more
run at 220 to 260 Gflop/s where MKL's run at 110.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch

LEAST_ROWS = 4
"""Below, what precedes a product of oneDNN takes longer than it gains."""
LEAST_WEIGHTS = 1 << 16


@functools.cache
def faster() -> bool:
    """Whether oneDNN multiplies by wider units here than MKL."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkl.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and not _of_intel()
    )


def _of_intel() -> bool:
    listed = Path("/proc/cpuinfo")
    return "GenuineIntel" in (listed.read_text(encoding="utf-8") if listed.is_file() else platform.processor())


def served(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    """Whether ``x @ w + bias`` is better made by :func:`mm`; what is wrong is left to PyTorch to refuse."""
    return (
        x.dtype == w.dtype == torch.float32
        and x.device.type == w.device.type == "cpu"
        and x.dim() == w.dim() == 2
        and len(x) >= LEAST_ROWS
        and x.shape[1] == w.shape[0]
        and w.numel() >= LEAST_WEIGHTS
        and (bias is None or bias.dtype == w.dtype and bias.device == x.device and bias.shape == w.shape[1:])
        and faster()
    )


def mm(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ w + bias`` of x [N, K], w [K, M], whatever their strides, and bias [M]: [N, M]. Not differentiable.

    In the precision that ``torch.backends.mkldnn.matmul`` allows, as PyTorch's own product.
    """
    return torch.ops.mkldnn._linear_pointwise(x, w.T, bias, "none", [], "")
