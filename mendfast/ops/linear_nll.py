"""Negative log-likelihood of the labels of a few rows under a frozen linear head, on the CPU.

The head of a small model is a large part of its weights. Logits, loss and gradient one after the other read it twice;
the kernel in ``csrc/cpu`` makes all three while a block of it is in the cache.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map_only

from .. import backends
from . import few_rows, frozen_linear, widened
from ._cpu_extension import kind_of, row_major, row_stride


class Logits(torch.Tensor):
    """``head(x)``, computed when something other than :meth:`nll` asks for it."""

    x: torch.Tensor  # [..., K]
    head: nn.Linear  # weight [V, K]
    _computed: torch.Tensor | None

    @classmethod
    def of(cls, x: torch.Tensor, head: nn.Linear) -> Logits:
        with torch.no_grad():
            self = x.new_empty(()).expand(*x.shape[:-1], head.out_features).as_subclass(cls)
        self.x, self.head, self._computed = x, head, None
        return self

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in _METADATA:
            return super().__torch_function__(func, types, args, kwargs or {})
        args, kwargs = tree_map_only(cls, cls.computed, (args, kwargs or {}))
        return func(*args, **kwargs)

    def computed(self) -> torch.Tensor:
        if self._computed is None:
            self._computed = frozen_linear.forward(self.head, self.x)
        return self._computed

    def first(self) -> Logits:
        """``logits[0]``"""
        return Logits.of(self.x[0], self.head)

    def nll(self, labels: torch.Tensor) -> torch.Tensor:  # [N] -> [N]
        """``logsumexp(logits) - logits[label]`` of each row of x [N, K]; 0 where the label is negative."""
        return _LinearNLL.apply(self.x, self.head.weight, self.head.bias, labels)


_METADATA = {
    torch.Tensor.dim,
    torch.Tensor.device.__get__,
    torch.Tensor.dtype.__get__,
    torch.Tensor.shape.__get__,
}


class _LinearNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, labels):
        nll, dx = kernel_nll(x, weight, bias, labels, gradient=ctx.needs_input_grad[0])
        ctx.dtype = x.dtype
        ctx.save_for_backward(dx)
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (dx,) = ctx.saved_tensors
        return (dx * grad.unsqueeze(1)).to(ctx.dtype), None, None, None


def kernel_nll(
    x: torch.Tensor,  # [N, K]
    weight: torch.Tensor,  # [V, K]
    bias: torch.Tensor | None,  # [V]
    labels: torch.Tensor,  # [N]
    gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The losses [N] and, if asked for, the gradient of each at its row of x, [N, K]; whatever the number of rows.

    Both in float32, whatever 16 bits x, weight and bias have.
    """
    from .. import _cpu

    rows, depth = x.shape
    x, bias = row_major(x.float()), None if bias is None else bias.float()
    labels = labels.to(torch.int64).contiguous()
    nll, dx = x.new_empty(rows), x.new_empty(rows, depth) if gradient else None
    _cpu.linear_nll(
        x.data_ptr(),
        row_stride(x),
        weight.data_ptr(),
        row_stride(weight),
        kind_of(weight.dtype),
        0 if bias is None else bias.data_ptr(),
        labels.data_ptr(),
        nll.data_ptr(),
        0 if dx is None else dx.data_ptr(),
        rows,
        len(weight),
        depth,
        torch.get_num_threads(),
    )
    return nll, dx


def serves(head: nn.Module, rows: int) -> bool:
    """Whether the kernel can make the losses of so many rows under this head, and is the faster way."""
    if type(head) is not nn.Linear or not frozen_linear.untouched(head) or torch.is_autocast_enabled("cpu"):
        return False
    weight = head.weight
    return (
        frozen_linear.plain(*head.parameters())
        and not any(p.requires_grad for p in head.parameters())
        and weight.device.type == "cpu"
        and backends.preferred("frozen_linear", weight.device) == "cpu"
        and (weight.dtype == torch.float32 or not widened.has_units(weight.dtype))
        and few_rows.served(torch.empty(rows, head.in_features, dtype=torch.float32), weight.T, head.bias)
    )
