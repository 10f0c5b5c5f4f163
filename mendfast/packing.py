"""Padding left out of a model's matrix products, and prompts out of their backward.

A linear layer gives each token its row whatever stands beside it, so within a block of ``packing()`` the layers of a
model's blocks are given the rows of real tokens alone, and zeros stand for what they would have made of padding.
Attention, which sees which tokens are masked, and all else run on the batch as it is.

Where only the gradients at some tokens are asked for, after which no other token of the loss's comes (those that
predict an answer), the layers pass no gradient to the others: no token of a causal model depends on later ones, so
that none of their gradients is part of those.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .capture import replaced_forwards
from .choice import stacks
from .ops.frozen_linear import is_linear
from .types import modules_of

COPIED = 16
"""Multiply-adds that take as long as to copy an element out of the batch and one back, forward and backward."""

LAUNCHED = 10**10
"""Multiply-adds that a GPU does while a layer's copies are launched. On an H200 steps of models up to GPT-2-XL's size
were 1.2 to 1.4 times as fast with their padding; that it pays where more is left out was counted and not measured."""


class Masks(NamedTuple):
    """Which tokens of a batch are real, for the blocks that see them."""

    thread: int
    of_blocks: list[tuple[list[nn.Module], torch.Tensor]]  # [B, S] bool
    learned: torch.Tensor | None = None  # [B, S] bool: the tokens whose gradients are asked for; None: all of them


class _Here(threading.local):
    asked = False
    masks: Masks | None = None


_here = _Here()


@contextlib.contextmanager
def packing(on: bool = True) -> Iterator[None]:
    """Within the block this thread's passes leave padding out of the products, where that takes less time by count.

    The results are the same to rounding, as the library's products of other sizes add in another order.
    """
    before, _here.asked = _here.asked, on
    try:
        yield
    finally:
        _here.asked = before


@contextlib.contextmanager
def packed_batch(
    model: nn.Module, *masks: torch.Tensor | None, learned: torch.Tensor | None = None
) -> Iterator[None]:
    """For the one pass within the block, where :func:`packing` was asked for.

    ``masks`` [B, S] say which tokens are real, of the encoder and the decoder, or of the one stack; None: all of them.
    ``learned`` [B, S], of one stack: the tokens whose gradients are asked for, none before others of the loss; None:
    all of them.
    """
    if learned is not None:
        masks = tuple(torch.ones_like(learned) if mask is None else mask for mask in masks)
    found = stacks(model) if _here.asked and any(mask is not None for mask in masks) else []
    if len(found) != len(masks) or len({mask.shape for mask in masks if mask is not None}) < len(masks):
        # a vision tower beside the text; or cross-attention, whose layers see both, couldn't tell one from the other
        yield
        return
    pairs = zip(found, masks, strict=True)
    masks_of = [
        (list(blocks), mask)
        for (_, blocks), mask in pairs
        if mask is not None and (learned is not None or not bool(mask.all()))
    ]
    before, _here.masks = _here.masks, Masks(threading.get_ident(), masks_of, learned)
    try:
        with packed(_here.masks):
            yield
    finally:
        _here.masks = before


def current() -> Masks | None:
    """Of the pass that this thread is in."""
    return _here.masks


@contextlib.contextmanager
def packed(masks: Masks | None, only: Collection[nn.Module] | None = None) -> Iterator[None]:
    """The layers of the masks' blocks (of ``only`` these) see the rows of real tokens."""
    forwards: dict[nn.Module, Callable] = {}
    for blocks, mask in masks.of_blocks if masks is not None else ():
        learned = mask if masks.learned is None else masks.learned
        both = torch.stack([learned.flatten(), (mask & ~learned).flatten()]).cpu()  # a GPU is waited for once
        sides = [kept.nonzero().squeeze(1).to(mask.device, non_blocking=True) for kept in both]
        for block in blocks:
            if only is not None and block not in only:
                continue
            for module in modules_of(block):
                if is_linear(type(module)) and _fewer(module, sides, mask.numel()):
                    forwards[module] = _packed(module.forward, mask.shape, sides, masks.thread)
    with replaced_forwards(forwards):
        yield


def _fewer(layer: nn.Module, sides: Sequence[torch.Tensor], rows: int) -> bool:
    """Whether the products that are left out, forward and backward, take longer than copying the others' rows."""
    if layer.weight.dim() != 2:  # packed by a quantiser
        return False
    n, m = layer.weight.shape
    learned, kept = len(sides[0]), sum(map(len, sides))
    launched = LAUNCHED if layer.weight.is_cuda else 0
    return (2 * rows - learned - kept) * n * m > 2 * COPIED * kept * (n + m) + launched


def _packed(forward: Callable, shape: torch.Size, sides: Sequence[torch.Tensor], thread: int) -> Callable:
    learned, others = sides

    def run(*args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        x = args[0] if args else None
        mine = len(args) == 1 and not kwargs and type(x) is torch.Tensor and threading.get_ident() == thread
        if not mine or x.dim() != 3 or x.shape[:2] != shape:
            return forward(*args, **kwargs)
        x, at = x.reshape(-1, x.shape[2]), learned.to(x.device)
        y = forward(Taken.apply(x, at))
        y = Placed.apply(y, at, shape.numel())
        if len(others):
            with torch.no_grad():
                there = others.to(x.device)
                y.data.index_copy_(0, there, forward(x.index_select(0, there)))
        return y.view(*shape, y.shape[1])

    return run


class Taken(torch.autograd.Function):
    """Rows [N, k], each at most once -> [K, k]; PyTorch's own backward adds one row after the other."""

    @staticmethod
    def forward(ctx, rows, at):
        ctx.save_for_backward(at)
        ctx.count = len(rows)
        return rows.index_select(0, at)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (at,) = ctx.saved_tensors
        return _place(grad, at, ctx.count), None


class Placed(torch.autograd.Function):
    """Rows [K, k] -> [N, k], zeros elsewhere."""

    @staticmethod
    def forward(ctx, rows, at, count):
        ctx.save_for_backward(at)
        return _place(rows, at, count)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (at,) = ctx.saved_tensors
        return grad.index_select(0, at), None, None


def _place(rows: torch.Tensor, at: torch.Tensor, count: int) -> torch.Tensor:
    return rows.new_zeros(count, rows.shape[1]).index_copy_(0, at, rows)
