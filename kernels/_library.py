"""Library GEMMs of a chosen precision, whatever the process's global settings are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

PIECE = 512
"""Terms of the largest of three products that matrix units add up before float32 does: they cut each partial sum off,
toward zero, and over 5,120 terms at once an H100 was 1.2e-5 away from the sum, ten times as far as float32."""


@contextlib.contextmanager
def library_precision(device: torch.device, precision: str = "ieee") -> Iterator[None]:
    """Within the block the library multiplies float32 in TF32 if ``precision`` is "tf32", else in float32.

    On a CPU always in float32: there ``torch.set_float32_matmul_precision("medium")`` would make it bfloat16.
    """
    settings = (torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn).matmul
    tf32 = precision == "tf32" and device.type == "cuda"
    if hasattr(settings, "fp32_precision"):
        # since 2.9; the older attribute raises once anyone has used this one
        name, value = "fp32_precision", "tf32" if tf32 else "ieee"
    elif device.type == "cuda":
        name, value = "allow_tf32", tf32
    else:
        yield
        return
    previous = getattr(settings, name)
    setattr(settings, name, value)
    try:
        yield
    finally:
        setattr(settings, name, previous)


def split(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x = high + low, exactly, with ``high`` a TF32 number: its last 13 bits are zero."""
    high = (x.view(torch.int32) & -8192).view(torch.float32)
    return high, x - high


def matmul(a: torch.Tensor, b: torch.Tensor, precision: str) -> torch.Tensor:
    """``a @ b`` of matrices by the library; of float32 on a GPU in "ieee", "tf32" or "tf32x3".

    tf32x3 is three TF32 products, low b's high, high b's low, high b's high, summed from small to large: what
    it drops, low times low, is 2^-20 of the product at the worst. See :data:`PIECE`.
    """
    if precision == "tf32x3" and a.is_cuda and a.dtype == torch.float32:
        return three_products(a, b)
    with library_precision(a.device, precision):
        return a @ b


def three_products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a_high, a_low = split(a)
    b_high, b_low = split(b)
    with library_precision(a.device, "tf32"):
        out = (a_low @ b_high).addmm_(a_high, b_low)
        for start in range(0, a.shape[1], PIECE):
            piece = slice(start, start + PIECE)
            out.addmm_(a_high[:, piece], b_high[piece])
        return out
