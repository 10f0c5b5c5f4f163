"""Products of few rows with large matrices on the CPU, of which one edit is made.

A library's matrix product is tuned for many rows. With the twenty of one example it waits for memory, or multiplies
at a fraction of what the processor can; the kernel in ``csrc/cpu`` reads the matrix once.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from .. import backends

MOST_ROWS = 96
"""From about as many on PyTorch's product is as fast."""
LEAST_WEIGHTS = 1 << 16
"""Below, a product takes no longer than the call."""


def mm(
    x: torch.Tensor,  # [N, K]
    w: torch.Tensor,  # [K, M], rows or columns contiguous
    bias: torch.Tensor | None = None,  # [M]
) -> torch.Tensor:  # [N, M]
    """``x @ w + bias`` by the kernel where that is faster, else by PyTorch. Not differentiable.

    float32; the result does not depend on the number of threads.
    """
    if problem() is None and served(x, w, bias):
        return kernel_mm(x, w, bias)
    return x @ w if bias is None else torch.addmm(bias, x, w)


def served(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether the kernel takes these arguments and is the faster one; what is wrong is left to PyTorch to refuse."""
    return (
        x.dtype == w.dtype == torch.float32
        and x.device.type == w.device.type == "cpu"
        and x.dim() == w.dim() == 2
        and x.shape[1] == w.shape[0]
        and w.numel() >= LEAST_WEIGHTS
        and (_transposed(w) or w.stride(1) == 1 and w.stride(0) >= w.shape[1])
        and 0 < len(x) <= MOST_ROWS
        and (bias is None or bias.dtype == torch.float32 and bias.shape == w.shape[1:] and bias.is_contiguous())
    )


def _transposed(w: torch.Tensor) -> bool:
    """Whether the columns are contiguous, and the rows are not."""
    return w.stride(0) == 1 and w.stride(1) >= w.shape[0]


def kernel_mm(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """:func:`mm` by the kernel, whatever the number of rows."""
    from .. import _cpu

    (rows, depth), cols = x.shape, w.shape[1]
    x = x if x.stride(1) == 1 and x.stride(0) >= depth else x.contiguous()
    transposed = _transposed(w)
    y = x.new_empty(rows, cols)
    _cpu.few_rows(
        x.data_ptr(),
        x.stride(0),
        w.data_ptr(),
        w.stride(1) if transposed else w.stride(0),
        transposed,
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        cols,
        rows,
        cols,
        depth,
        torch.get_num_threads(),
    )
    return y


def _problem() -> str | None:
    try:
        from .. import _cpu
    except ImportError as error:
        from ..build_info import build_info

        reason = build_info("cpu")["reason"]
        return str(reason or f"the CPU extension can't be loaded ({error}); install mendfast again")
    return _cpu.problem() or None


_PROBLEM = _problem()


def problem() -> str | None:
    """Why the CPU extension can't run on this machine, or None."""
    return _PROBLEM


def probe(device: torch.device) -> str | None:
    """Why the kernel can't serve ``device``, or None."""
    if device.type != "cpu":
        return f"the CPU extension runs on CPUs, and this is {device.type!r}"
    return problem()


# -- in a frozen model ---------------------------------------------------------------------------------------------


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, bias):
        ctx.save_for_backward(w)
        return mm(x, w, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (w,) = ctx.saved_tensors
        return mm(grad, w.T), None, None


class _FrozenProducts(TorchFunctionMode):
    """Takes the products out of nn.Linear (F.linear) and transformers' Conv1D (torch.addmm)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        product = _PRODUCTS.get(func)
        if product is None or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)
        found = product(*args, **kwargs)
        return func(*args, **kwargs) if found is None else found


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor | None:
    if not plain(input, weight) or input.dim() == 0 or weight.dim() != 2:
        return None
    y = _product(input.reshape(-1, input.shape[-1]), weight.T, bias)
    return None if y is None else y.view(*input.shape[:-1], -1)


def _addmm(input: torch.Tensor, mat1: torch.Tensor, mat2: torch.Tensor, **others) -> torch.Tensor | None:
    return None if others else _product(mat1, mat2, input)


def _product(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
    """:func:`mm` with a gradient for ``x``, or None: PyTorch's way."""
    parameters = (w,) if bias is None else (w, bias)
    if not plain(x, *parameters) or any(p.requires_grad for p in parameters) or not served(x, w, bias):
        return None
    return _FrozenProduct.apply(x, w, bias) if x.requires_grad and torch.is_grad_enabled() else mm(x, w, bias)


def plain(*tensors: torch.Tensor) -> bool:
    """No quantised, sharded, sparse or nested ones, nor those of a tracer."""
    return all(
        type(t) in (torch.Tensor, torch.nn.Parameter) and t.layout is torch.strided and not t.is_nested for t in tensors
    )


_PRODUCTS = {F.linear: _linear, torch.addmm: _addmm}


def frozen_products(device: torch.device) -> contextlib.AbstractContextManager:
    """Within the block the linear layers of a model on ``device`` that ask for no gradient use :func:`mm`."""
    chosen = backends.preferred("frozen_linear", device)
    return _FrozenProducts() if chosen == "cpu" else contextlib.nullcontext()


backends.register("frozen_linear", {"cpu": probe, "aten": lambda device: None})
