"""Fill a cache of the frozen part ahead of training; of a model whose frozen blocks lie on disk, block by block."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn
from tqdm import tqdm

from ..capture import ended_after, frozen, replaced_forwards, undone
from ..layers import execution_device
from ..objective import Batch, kept_rows, to_device
from ..packing import packing
from .cache import PrefixCache, Text, together

log = logging.getLogger("mendfast")

HELD = 1 << 16
"""Tokens whose states are taken through the blocks side by side: a block's passes follow one another, so that its
weights come from the disk once for so many, and then from the system's own cache."""


def prefill(cache: PrefixCache, batches: Iterable[tuple[Batch, bool]], *, progress: bool | None = None) -> int:
    """Compute what ``cache`` lacks of the texts of ``batches``, each with whether the unedited model's final states
    are wanted too (:meth:`PrefixCache.replayed`).

    Of a model whose blocks a device map has put on disk each runs over :data:`HELD` tokens before the next one does;
    the states are the same.

    Args:
        progress: True shows a bar, None where there is a terminal.

    Returns:
        How many texts were computed.
    """
    before = cache.computed
    wanted: dict[bool, dict[bytes, Text]] = {False: {}, True: {}}
    for batch, final in batches:
        if not cache.serves(batch):
            return 0
        wanted[final and cache.one_stack] |= {text.key: text for text in cache.missing(batch, final)}
    wanted[False] = {key: text for key, text in wanted[False].items() if key not in wanted[True]}
    on_disk = cache.one_stack and any(p.is_meta for block in cache.blocks(False) for p in block.parameters())
    count, hidden = sum(map(len, wanted.values())), None if progress is None else not progress
    with tqdm(total=count, desc="frozen part", unit="text", disable=hidden) as bar:
        for final, texts in wanted.items():
            for chunk in _chunks(cache.groups(texts.values()), HELD if on_disk else 1):
                if cache.forgot:
                    log.warning(
                        "The cache of the frozen part is full with %d of %d texts; the others are computed as they are "
                        "asked for. Give it more (cache_bytes), or a place on disk (cache_disk_bytes).", bar.n, count,
                    )  # fmt: skip
                    return cache.computed - before
                _by_blocks(cache, chunk, final) if on_disk else cache.compute(chunk[0], final)
                cache.shrink()
                bar.update(sum(map(len, chunk)))
    return cache.computed - before


def _chunks(groups: Iterable[Sequence[Text]], most: int) -> Iterator[list[Sequence[Text]]]:
    """Groups together, of ``most`` tokens or each alone."""
    chunk: list[Sequence[Text]] = []
    tokens = 0
    for group in groups:
        size = sum(text.inputs["input_ids"].shape[1] for text in group)
        if chunk and tokens + size > most:
            yield chunk
            chunk, tokens = [], 0
        chunk.append(group)
        tokens += size
    if chunk:
        yield chunk


@torch.no_grad()
def _by_blocks(cache: PrefixCache, groups: Sequence[Sequence[Text]], final: bool) -> None:
    """One block over all groups, and then the next one."""
    model, blocks, edge = cache.model, cache.blocks(final), cache.blocks(False)[-1]
    device = execution_device(model.get_input_embeddings())
    batches = [to_device(together([text.inputs for text in group]), device) for group in groups]
    states: list[torch.Tensor] = []
    for i, block in enumerate(blocks):
        below = blocks[:i]
        for number, batch in enumerate(batches):
            given = cache.replaying(below, states[number]) if below else {}
            found = _through(model, block, batch, given)
            if below:
                states[number] = found
            else:
                states.append(found)
        if block is edge or i == len(blocks) - 1:
            for group, found in zip(groups, states, strict=True):
                cache.keep(group, found, final=block is not edge)


def _through(model: nn.Module, block: nn.Module, batch: Batch, given: dict) -> torch.Tensor:
    """What ``block`` gives for a batch: [B, S, width]."""
    seen: list[torch.Tensor] = []

    def keep(module: nn.Module, args: tuple, output: object) -> None:
        seen.append(output if isinstance(output, torch.Tensor) else output[0])  # type: ignore[index]

    with torch.inference_mode(False), packing(False), frozen(model), replaced_forwards(given), undone() as changes:
        changes.hook(block, keep)  # before the one that ends the pass
        with ended_after(block):
            kept_rows(model, batch)
    return seen[0].detach()
