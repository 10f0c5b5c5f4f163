"""Activation checkpointing of the edited blocks: their insides are computed again in the backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import nn
from torch.utils.checkpoint import checkpoint

from ..capture import Factors, frozen, lowrank_updates, replaced_forwards
from ..choice import stacks
from ..layers import Layer
from ..packing import Masks, current, packed


@contextlib.contextmanager
def recomputed_updates(
    model: nn.Module, layers: Sequence[Layer], factors: Mapping[str, Factors], prefix: Sequence[nn.Module]
) -> Iterator[None]:
    """:func:`mendfast.capture.lowrank_updates` that keeps the blocks' inputs alone for the backward pass.

    Recomputation happens when this context has closed, so each block carries its updates and its frozen weights
    with it. Blocks of ``prefix``, which no gradient reaches, run as they are; so do edited layers outside all
    blocks. Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".
    """
    blocks = [block for _, stack in stacks(model) for block in stack if block not in prefix]
    forwards, outside = {}, list(layers)
    for block in blocks:
        inside = set(block.modules())
        own = [layer for layer in layers if layer.place in inside]
        outside = [layer for layer in outside if layer not in own]
        forwards[block] = _recomputing(block, block.forward, own, factors)
    with replaced_forwards(forwards), lowrank_updates(outside, factors):
        yield


def _recomputing(block: nn.Module, forward: Callable, own: list[Layer], factors: Mapping[str, Factors]) -> Callable:
    def run(masks: Masks | None, *args: object, **kwargs: object) -> object:
        with frozen(block), packed(masks, [block]), lowrank_updates(own, factors):
            return forward(*args, **kwargs)

    def recomputing(*args: object, **kwargs: object) -> object:
        # Frozen blocks are in eval mode and draw no random numbers.
        return checkpoint(run, current(), *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return recomputing
