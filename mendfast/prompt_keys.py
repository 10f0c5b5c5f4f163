"""Prompts that many edited models are asked: what the blocks below the edits make of them, computed once."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from .capture import UNSERVED, ended_after, replaced_forwards
from .choice import frozen_ends, stacks
from .labels import collate
from .layers import Layer
from .objective import model_kind
from .shared_prefix import run_to

log = logging.getLogger("mendfast")


class _Prompt(NamedTuple):
    states: torch.Tensor  # [S, width]: what the last of the blocks gives
    keys: list[torch.Tensor]  # of each block [heads, S, size]
    values: list[torch.Tensor]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.states, *self.keys, *self.values))


class PromptKeys:
    """The keys and values of prompts in the blocks that no edit of ``layers`` changes, and what those blocks give.

    The weights of those blocks must stay as they are while it is used. Answers agree with plain passes to rounding.

    Args:
        limit: bytes to keep; what comes later is computed whenever it is asked for.

    Attributes:
        blocks: those; none where nothing can be kept, and then it must not be used.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], limit: int):
        self.model, self.limit, self.held = model, limit, 0
        self._kept: dict[tuple[int, ...], _Prompt] = {}
        self.blocks: list[nn.Module] = []
        self._last: nn.Module | None = None
        if layers and model_kind(model) == "causal" and len(found := stacks(model)) == 1:
            kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
            taken = "position_ids" in inspect.signature(model.forward).parameters
            if taken and kinds == {"full_attention"} and not getattr(model, "_is_stateful", False):
                self._last = found[0][1][-1]
                self.blocks = next(iter(frozen_ends(model, layers)), [])

    @torch.no_grad()
    def read(
        self,
        cache: dict[str, Any],
        prompts: Sequence[Sequence[int]],
        ids: torch.Tensor,  # [B, S]
        mask: torch.Tensor,  # [B, S]
        shared: int,
    ) -> None:
        """Bring ``cache``, which holds the first ``shared`` tokens of all rows, on to the end of ``ids``.

        Row i is ``prompts[i]``, its padding behind the shared tokens. The other blocks run, as they are edited now.
        """
        try:
            found = self._of(prompts)
        except UNSERVED as problem:
            # whatever a model that keeps other things than keys and values makes of it; the caller's pass reads all
            log.info("%s reads prompts whole for each edit: %s", type(self.model).__name__, problem)
            self.blocks = []
            return
        (past,) = cache.values()
        width, device = ids.shape[1], ids.device
        states, tail = found[0].states.new_zeros(len(ids), width - shared, found[0].states.shape[1]), self._tail
        keys, values = ([self._room(part, len(ids), width - shared) for part in side] for side in found[0][1:])
        for i, prompt in enumerate(found):
            rest = slice(width - len(prompts[i]), None)
            states[i, rest] = prompt.states[shared:]
            for to, parts in ((keys, prompt.keys), (values, prompt.values)):
                for one, part in zip(to, parts, strict=True):
                    one[i, :, rest] = part[:, shared:]
        states = states.to(device)
        given = states if tail is None else (states, *tail)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, shared:]
        with replaced_forwards({block: lambda *_, **__: given for block in self.blocks}), ended_after(self._last):
            self.model(ids[:, shared:], attention_mask=mask, position_ids=positions, use_cache=True, **cache)
        for i, (key, value) in enumerate(zip(keys, values, strict=True)):
            past.update(key.to(device), value.to(device), i)

    @staticmethod
    def _room(part: torch.Tensor, rows: int, width: int) -> torch.Tensor:
        return part.new_zeros(rows, part.shape[0], width, part.shape[2])

    def _of(self, prompts: Sequence[Sequence[int]]) -> list[_Prompt]:
        asked = [tuple(prompt) for prompt in prompts]
        new = self._computed([prompt for prompt in dict.fromkeys(asked) if prompt not in self._kept])
        for prompt, found in new.items():
            if self.held + found.nbytes <= self.limit:
                self._kept[prompt], self.held = found, self.held + found.nbytes
        return [self._kept.get(prompt) or new[prompt] for prompt in asked]

    def _computed(self, prompts: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], _Prompt]:
        from transformers import DynamicCache

        found: dict[tuple[int, ...], _Prompt] = {}
        for start in range(0, len(prompts), 16):
            some = prompts[start : start + 16]
            examples = [{"input_ids": list(p), "attention_mask": [1] * len(p), "labels": list(p)} for p in some]
            batch = collate(examples, pad_token_id=0, encoder_decoder=False)
            batch.pop("labels")
            past = DynamicCache(config=self.model.config)
            states, self._tail = run_to(self.model, self.blocks[-1], batch, past)
            for i, prompt in enumerate(some):
                sides = (
                    [getattr(past.layers[j], side)[i, :, : len(prompt)].cpu().clone() for j in range(len(self.blocks))]
                    for side in ("keys", "values")
                )
                found[prompt] = _Prompt(states[i, : len(prompt)].cpu().clone(), *sides)
        return found
