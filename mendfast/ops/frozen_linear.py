"""The linear layers of a frozen model on the CPU: by the kernel for few rows, with 16-bit weights widened as they are
read, or by the wider units for many rows, where one of them is faster than PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .. import backends
from ..types import is_conv1d, modules_of
from . import few_rows, many_rows, widened


class _FrozenProduct(torch.autograd.Function):
    """x @ w + bias by one product, and the gradient of x by another, grad @ w.T."""

    @staticmethod
    def forward(ctx, x, w, bias, product, transposed):
        ctx.save_for_backward(w)
        ctx.transposed = transposed
        return product(x, w, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (w,) = ctx.saved_tensors
        return ctx.transposed(grad, w), None, None, None, None


def _transposed(grad: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return few_rows.mm(grad, w.T)


def forward(layer: nn.Module, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
    """The forward of a frozen nn.Linear or Conv1D; what the kernel doesn't serve is left to the layer's own."""
    if len(args) == 1 and not kwargs and not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu"):
        x, weight, bias = args[0], layer.weight, layer.bias
        parameters = (weight,) if bias is None else (weight, bias)
        if plain(x, *parameters) and x.dim() and not any(p.requires_grad for p in parameters):
            w = weight.T if isinstance(layer, nn.Linear) else weight
            rows = x.reshape(-1, x.shape[-1])
            products: tuple[Callable, Callable] | None = None
            if few_rows.served(rows, w, bias):
                products = few_rows.kernel_mm, _transposed
            elif widened.served(rows, w, bias):
                products = widened.mm, widened.mm_transposed
            elif many_rows.served(rows, w, bias):
                products = many_rows.mm, _transposed
            if products is not None:
                differentiable = x.requires_grad and torch.is_grad_enabled()
                y = _FrozenProduct.apply(rows, w, bias, *products) if differentiable else products[0](rows, w, bias)
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
def is_linear(kind: type) -> bool:
    """Whether a layer of that class is PyTorch's nn.Linear or Hugging Face's Conv1D, and nothing made of them."""
    return kind is nn.Linear or is_conv1d(kind)


def frozen_forwards(model: nn.Module) -> dict[nn.Module, Callable[..., torch.Tensor]]:
    """Forwards by the kernel for the nn.Linear and Conv1D layers of ``model``, while they ask for no gradient.

    To replace those, and not PyTorch's functions, slows down no other call.
    """
    if backends.preferred("frozen_linear", next(model.parameters()).device) != "cpu":
        return {}
    layers = [layer for layer in modules_of(model) if is_linear(type(layer)) and "forward" not in vars(layer)]
    return {layer: functools.partial(forward, layer) for layer in layers}
