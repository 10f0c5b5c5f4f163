"""Products of few rows with large matrices on the CPU, of which one edit is made.

A library's matrix product is tuned for many rows. With the twenty of one example it waits for memory, or multiplies
at a fraction of what the processor can; the kernel in ``csrc/cpu`` reads the matrix once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import many_rows
from ._cpu_extension import instructions, kind_of, problem, row_major, row_stride

MOST_ROWS = 96
"""From about as many on PyTorch's product is as fast,"""
MOST_BESIDE = {"avx512": {True: MOST_ROWS, False: 48}, "avx2": {True: 20, False: 6}}
"""and that of :mod:`mendfast.ops.many_rows`, of a float32 w whose columns are contiguous, or its rows."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of w and bias."""
LEAST_WEIGHTS = 1 << 16
"""Below, a product takes no longer than the call."""


def mm(
    x: torch.Tensor,  # [N, K]
    w: torch.Tensor,  # [K, M], rows or columns contiguous
    bias: torch.Tensor | None = None,  # [M]
) -> torch.Tensor:  # [N, M]
    """``x @ w + bias`` by the kernel where that is faster, else by PyTorch. Not differentiable.

    float32, of w and bias of 16 bits too; the result does not depend on the number of threads.
    """
    if problem() is None and served(x, w, bias):
        return kernel_mm(x, w, bias)
    return library_mm(x, w, bias)


def library_mm(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None, product: Callable | None = None
) -> torch.Tensor:
    """:func:`mm` by PyTorch, by the faster of its libraries; ``product`` multiplies, if it is given."""
    if product is None:
        if many_rows.served(x, w, bias):
            return many_rows.mm(x, w, bias)
        product = torch.mm
    y = product(x, w)
    return y if bias is None else y.add_(bias)  # on the CPU addmm takes nearly twice as long


def served(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether the kernel takes these arguments and is the faster one; what is wrong is left to PyTorch to refuse."""
    return (
        x.dtype == torch.float32
        and w.dtype in DTYPES
        and x.device.type == w.device.type == "cpu"
        and x.dim() == w.dim() == 2
        and x.shape[1] == w.shape[0]
        and w.numel() >= LEAST_WEIGHTS
        and has_lines(w)
        and 0 < len(x) <= most_rows(w)
        and (bias is None or _fits(bias, w))
    )


def most_rows(w: torch.Tensor) -> int:
    """Up to how many the kernel is the faster one."""
    beside = w.dtype == torch.float32 and many_rows.faster()
    return min(MOST_ROWS, MOST_BESIDE[instructions()][_transposed(w)]) if beside else MOST_ROWS


def _fits(bias: torch.Tensor, w: torch.Tensor) -> bool:
    alike = bias.dtype == w.dtype and bias.device == w.device
    return alike and bias.shape == w.shape[1:] and bias.is_contiguous()


def has_lines(w: torch.Tensor) -> bool:
    """Whether the rows or the columns are contiguous, as the kernel needs them."""
    return _transposed(w) or w.stride(1) == 1 and w.stride(0) >= w.shape[1]


def _transposed(w: torch.Tensor) -> bool:
    """Whether the columns are contiguous, and the rows are not."""
    return w.stride(0) == 1 and w.stride(1) >= w.shape[0]


def kernel_mm(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """:func:`mm` by the kernel, whatever the number of rows; w and bias of 16 bits too, which is the product with
    the widened ones, to the bit."""
    from .. import _cpu

    (rows, depth), cols = x.shape, w.shape[1]
    x, bias = row_major(x), None if bias is None else bias.float()
    transposed = _transposed(w)
    y = x.new_empty(rows, cols)
    _cpu.few_rows(
        x.data_ptr(),
        row_stride(x),
        w.data_ptr(),
        row_stride(w.T if transposed else w),
        transposed,
        kind_of(w.dtype),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        cols,
        rows,
        cols,
        depth,
        torch.get_num_threads(),
    )
    return y
