"""Products of few rows with large matrices on the CPU, of which one edit is made.

A library's matrix product is tuned for many rows. With the twenty of one example it waits for memory, or multiplies
at a fraction of what the processor can; the kernel in ``csrc/cpu`` reads the matrix once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn
from torch.autograd.function import once_differentiable

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
    return library_mm(x, w, bias)


def library_mm(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """:func:`mm` by PyTorch."""
    y = torch.mm(x, w)
    return y if bias is None else y.add_(bias)  # on the CPU addmm takes nearly twice as long


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
        return kernel_mm(x, w, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (w,) = ctx.saved_tensors
        return mm(grad, w.T), None, None


def forward(layer: nn.Module, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
    """The forward of a frozen nn.Linear or Conv1D; what the kernel doesn't serve is left to the layer's own."""
    if len(args) == 1 and not kwargs and not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu"):
        x, weight, bias = args[0], layer.weight, layer.bias
        parameters = (weight,) if bias is None else (weight, bias)
        if plain(x, *parameters) and x.dim() and not any(p.requires_grad for p in parameters):
            w = weight.T if isinstance(layer, nn.Linear) else weight
            rows = x.reshape(-1, x.shape[-1])
            if served(rows, w, bias):
                differentiable = x.requires_grad and torch.is_grad_enabled()
                y = _FrozenProduct.apply(rows, w, bias) if differentiable else kernel_mm(rows, w, bias)
                return y.view(*x.shape[:-1], -1)
    return type(layer).forward(layer, *args, **kwargs)


def plain(*tensors: object) -> bool:
    """No quantised, sharded, sparse or nested ones, nor those of a tracer."""
    return all(
        type(t) in (torch.Tensor, nn.Parameter) and t.layout is torch.strided and not t.is_nested for t in tensors
    )


def untouched(layer: nn.Module) -> bool:
    """Whether nobody but :func:`frozen_forwards` has given the layer a forward of its own, as accelerate does."""
    own = vars(layer).get("forward")
    return own is None or isinstance(own, functools.partial) and own.func is forward


@functools.cache
def _is_linear(kind: type) -> bool:
    return kind is nn.Linear or kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def frozen_forwards(model: nn.Module) -> dict[nn.Module, Callable[..., torch.Tensor]]:
    """Forwards by the kernel for the nn.Linear and Conv1D layers of ``model``, while they ask for no gradient.

    To replace those, and not PyTorch's functions, slows down no other call.
    """
    if backends.preferred("frozen_linear", next(model.parameters()).device) != "cpu":
        return {}
    layers = [layer for layer in model.modules() if _is_linear(type(layer)) and "forward" not in vars(layer)]
    return {layer: functools.partial(forward, layer) for layer in layers}


backends.register("frozen_linear", {"cpu": probe, "aten": lambda device: None})
