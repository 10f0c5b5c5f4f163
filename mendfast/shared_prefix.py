"""The tokens that many texts begin with, as a chat template's system turn, through the frozen blocks once for all."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .capture import UNSERVED, agree, ended_after, frozen, replaced_forwards, undone
from .choice import frozen_ends, stacks
from .layers import Layer, execution_device
from .objective import Batch, model_kind, to_device

log = logging.getLogger("mendfast")

SHARED = 8
"""Tokens that all rows must begin with for generation to read them once."""


class SharedPrefix:
    """The common first tokens of texts, as the blocks below the edited layers of a causal model see them.

    >>> prefix = SharedPrefix.of(model, layers, [ids, ...])
    >>> with prefix.replayed(batch): model(**batch)  # the frozen blocks ran over what follows the prefix alone

    Those blocks' keys and values of the prefix are kept and used for all texts; the edited blocks run whole, since
    edits are made of the prefix's rows there too. Results agree with plain passes to rounding, which is tried on one
    text when this is made. The weights must stay as they are while it is used.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], ids: Sequence[int]):
        from transformers import DynamicCache

        self._model, self._blocks = model, list(blocks)
        self.ids = torch.tensor([list(ids)])
        self._past: Any = DynamicCache(config=model.config)
        self._states, self._tail = self._run({"input_ids": self.ids}, self._past)

    @classmethod
    def of(cls, model: nn.Module, layers: Sequence[Layer], texts: Sequence[Sequence[int]]) -> SharedPrefix | None:
        """None where there is none worth it, or where the model can't go on from keys and values."""
        if len(texts) < 2 or model_kind(model) != "causal" or len(stacks(model)) != 1:
            return None
        shared = len(os.path.commonprefix([list(text) for text in texts]))
        shared, longest_of = min(shared, min(map(len, texts)) - 1), max(map(len, texts))
        ends = frozen_ends(model, layers)
        kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
        if shared * len(texts) <= 2 * (shared + longest_of):  # the tokens that making and trying it runs
            return None
        if not ends or getattr(model, "_is_stateful", False) or kinds != {"full_attention"}:
            return None
        try:
            prefix = cls(model, ends[0], texts[0][:shared])
            longest = {"input_ids": torch.tensor([list(max(texts, key=len))])}
            plain, _ = prefix._run(longest, None)
            whole = prefix._whole(longest)
        except UNSERVED as problem:
            # whatever a model that keeps other things than keys and values makes of them
            log.info("%s runs the %d tokens that all begin with for each: %s", type(model).__name__, shared, problem)
            return None
        if not agree(whole, plain):
            log.info("%s runs the tokens that all begin with for each: kept, they give others", type(model).__name__)
            return None
        return prefix

    @contextlib.contextmanager
    def replayed(self, batch: Batch) -> Iterator[None]:
        """A forward pass within the block on ``batch``, right-padded texts that begin with the prefix, takes the frozen
        blocks' states from here."""
        states = self._whole(batch)
        given = states if self._tail is None else (states, *self._tail)
        with replaced_forwards({block: lambda *_, **__: given for block in self._blocks}):
            yield

    def _whole(self, batch: Batch) -> torch.Tensor:
        """What the last frozen block gives for a batch: [B, S, width]."""
        count, length = len(batch["input_ids"]), self.ids.shape[1]
        if not bool((batch["input_ids"][:, :length].cpu() == self.ids).all()):
            raise ValueError(f"A text doesn't begin with the {length} tokens that all of them should.")
        past = copy.deepcopy(self._past)
        past.batch_repeat_interleave(count)
        rest = {**batch, "input_ids": batch["input_ids"][:, length:]}
        rest.pop("labels", None)
        states, _ = self._run(rest, past)
        return torch.cat([self._states.expand(count, -1, -1), states], dim=1)

    def _run(self, batch: Batch, past: Any) -> tuple[torch.Tensor, tuple | None]:
        return run_to(self._model, self._blocks[-1], batch, past)


@torch.no_grad()
def run_to(model: nn.Module, last: nn.Module, batch: Batch, past: Any) -> tuple[torch.Tensor, tuple | None]:
    """The states that the block ``last`` gives, and what beside them; ``past``, a cache of keys and values or None,
    then holds the batch's tokens too.

    Raises:
        ValueError: it gives more than hidden states.
    """
    seen: list[Any] = []

    def keep(module: nn.Module, args: tuple, output: object) -> None:
        seen.append(output)

    with torch.inference_mode(False), frozen(model), undone() as changes:
        changes.hook(last, keep)  # before the one that ends the pass
        placed = to_device(batch, execution_device(model.get_input_embeddings()))
        name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        with ended_after(last):
            model(**placed, **{name: past}, use_cache=past is not None)
    (output,) = seen
    states, tail = (output, None) if isinstance(output, torch.Tensor) else (output[0], tuple(output[1:]))
    if any(part is not None for part in tail or ()):
        raise ValueError("its blocks give more than hidden states")
    return states, tail


# -- in generation -------------------------------------------------------------------------------------------


def shared_start(model: Any, rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with, where it pays to read them once: padding then stands behind them, which a
    model must not take for distance. One at least of each row is left."""
    count = min(len(os.path.commonprefix([list(row) for row in rows])), min(map(len, rows)) - 1)
    if len(rows) < 2 or count < SHARED:
        return 0
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    windows = getattr(config, "sliding_window", None) is not None
    taken = "position_ids" in inspect.signature(model.forward).parameters
    own = getattr(getattr(model, "generation_config", None), "cache_implementation", None) is not None
    return count if taken and not windows and not own else 0


def padded(
    rows: Sequence[Sequence[int]], pad: int, *, behind: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask [B, S], the padding ``behind`` so many tokens of each row; None: behind all of them."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), pad), torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        start = len(row) if behind is None else behind
        ids[i, :start], mask[i, :start] = torch.tensor(row[:start]), 1
        place = slice(width - len(row) + start, None)
        ids[i, place], mask[i, place] = torch.tensor(row[start:]), 1
    return ids, mask


def cache_of(out: Any) -> dict[str, Any]:
    """What generate can go on from, as its argument; what else a model keeps can't be cut to some rows."""
    from transformers import DynamicCache

    found = {name: out[name] for name in ("cache", "past_key_values") if name in out}
    return {name: cache for name, cache in list(found.items())[:1] if isinstance(cache, DynamicCache)}


def read_once(model: Any, ids: torch.Tensor, rows: Sequence[int]) -> dict[str, Any]:
    """The cache of ``ids`` [S], with which all of several rows begin: read once for each of the kinds of ``rows``,
    numbered from 0 (a model that is edited otherwise for each)."""
    cache = cache_of(model(ids.expand(max(rows) + 1, -1), use_cache=True))
    for one in cache.values():
        one.batch_select_indices(torch.tensor(rows, device=ids.device))
    return cache
