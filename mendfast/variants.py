"""Several edited models as one: each row of a batch passes the weights of its own edit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional

from .capture import replaced_forwards
from .layers import Layer
from .ops.frozen_linear import is_linear

Weights = Mapping[str, torch.Tensor]
"""A weight's name -> its value in an edited model, laid out as the model has it."""


def held_apart(layers: Sequence[Layer]) -> bool:
    """Whether each of the layers is a plain linear one, for which :class:`Variants` can stand in."""
    return all(is_linear(type(layer.module)) and layer.place is layer.module for layer in layers)


class Variants:
    """A model under several edits at once, for prompts that belong to one edit each.

    Args:
        layers: those that any of the edits writes into.
        weights: of each edit, what it has made of some of them.
        of: of each prompt its edit's number.
    """

    def __init__(self, layers: Sequence[Layer], weights: Sequence[Weights], of: Sequence[int]):
        self.layers, self.weights, self.of = list(layers), list(weights), list(of)

    @contextlib.contextmanager
    def rows(self, edits: Sequence[int]) -> Iterator[None]:
        """A pass within the block on a batch [B, S] reads row i by edit ``edits[i]``."""
        groups = {edit: [i for i, own in enumerate(edits) if own == edit] for edit in dict.fromkeys(edits)}
        with replaced_forwards({layer.module: self._forward(layer, len(edits), groups) for layer in self.layers}):
            yield

    def _forward(self, layer: Layer, count: int, groups: Mapping[int, Sequence[int]]) -> Callable:
        module: nn.Module = layer.module
        own = [(self.weights[edit].get(layer.name, module.weight), at) for edit, at in groups.items()]

        def forward(x: torch.Tensor) -> torch.Tensor:
            rows = x.reshape(count, -1, layer.m)
            out = rows.new_empty(*rows.shape[:2], layer.n)
            for weight, at in own:
                weight = weight if layer.layout == "out_in" else weight.T
                out[at] = functional.linear(rows[at], weight, module.bias)
            return out.reshape(*x.shape[:-1], layer.n)

        return forward
