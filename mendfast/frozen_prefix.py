"""Run the frozen part once: the blocks below the first edited layer are computed once per batch of tokens."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence

from torch import nn

from .capture import replaced_forwards
from .choice import frozen_ends
from .layers import Layer

log = logging.getLogger("mendfast")


class FrozenPrefix:
    """The blocks of a model whose outputs no edit of ``layers`` changes.

    >>> prefix = FrozenPrefix(model, layers)
    >>> with prefix.recorded(): model(**batch)      # keeps the last frozen block's output
    >>> with prefix.replayed(): model(**batch)      # the frozen blocks are not run again

    ``ends`` are the frozen blocks of each stack, ``blocks`` all of them; both are empty, and the contexts do nothing,
    where the model has no stack of blocks to split.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer]):
        self.ends = frozen_ends(model, layers)
        self.blocks = [block for blocks in self.ends for block in blocks]
        self._kept: dict[nn.Module, object] = {}
        if not self.blocks:
            log.info("%s has no blocks below its edited layers to reuse: it runs whole", type(model).__name__)

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """A forward pass within the block keeps what the frozen blocks put out."""

        def keep(module: nn.Module, args: tuple, output: object) -> None:
            self._kept[module] = output

        handles = [last.register_forward_hook(keep) for *_, last in self.ends]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """The first time as :meth:`recorded`, and then as :meth:`replayed`, without forgetting."""
        if not self._kept:
            with self.recorded():
                yield
            return
        states = dict(self._kept)
        with self.replayed():
            yield
        self._kept |= states

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """A forward pass within the block, on the same tokens, takes that output for theirs."""
        # a vision tower's blocks don't run for text
        ran = [blocks for blocks in self.ends if blocks[-1] in self._kept]
        ends = {block: self._kept[blocks[-1]] for blocks in ran for block in blocks}
        try:
            with replaced_forwards({block: lambda *_, kept=kept, **__: kept for block, kept in ends.items()}):
                yield
        finally:
            self._kept.clear()
