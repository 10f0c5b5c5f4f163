"""Library GEMMs of a chosen precision, whatever the process's global settings are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """cuBLAS with or without TF32 within the block."""
    matmul_settings = torch.backends.cuda.matmul
    if hasattr(matmul_settings, "fp32_precision"):
        # since 2.9; the older attribute raises once anyone has used this one
        name, value = "fp32_precision", "tf32" if allowed else "ieee"
    else:
        name, value = "allow_tf32", allowed
    previous = getattr(matmul_settings, name)
    setattr(matmul_settings, name, value)
    try:
        yield
    finally:
        setattr(matmul_settings, name, previous)


def split(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x = high + low, exactly, with ``high`` a TF32 number: its last 13 bits are zero."""
    high = (x.view(torch.int32) & -8192).view(torch.float32)
    return high, x - high


def matmul(a: torch.Tensor, b: torch.Tensor, precision: str) -> torch.Tensor:
    """``a @ b`` of float32 matrices by the library, in "ieee", "tf32" or "tf32x3".

    tf32x3 is three TF32 products, low b's high, high b's low, high b's high, summed from small to large: what
    it drops, low times low, is 2^-22 of the product.
    """
    if precision != "tf32x3" or not a.is_cuda:
        with _tf32(precision == "tf32"):
            return a @ b
    return three_products(a, b)


def three_products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a_high, a_low = split(a)
    b_high, b_low = split(b)
    with _tf32(True):
        return (a_low @ b_high).addmm_(a_high, b_low).addmm_(a_high, b_high)
