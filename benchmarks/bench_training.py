"""What does a step of meta-training save where its texts come back, are of several lengths, or are read in places?"""

from __future__ import annotations

import pytest
import torch

from mendfast.objective import to_device
from mendfast.training import editor_loss
from mendfast.training.cache import PrefixCache

from .bench_edit import _editor
from .cases import Case, cases
from .contest import Contestant, relative_error
from .shapes import LOCALITY_TOKENS, SHAPES, TARGET_TOKENS, batch

SMOLLM2 = SHAPES["SmolLM2-135M"]
CASES = [case for case in cases((4, 16), typical=4, cpu=(4,), cpu_others=False) if case.shape != SMOLLM2]
CASES.append(Case(SMOLLM2, 8, True, False))
LOCALITY = {SMOLLM2.name: (3, 32)}
"""Locality texts for each edit and their length, where it is not one of LOCALITY_TOKENS."""
POSITIONS = 12
CACHE_BYTES = 1 << 30


def _ragged(shape, size: int, length: int, seed: int) -> dict[str, torch.Tensor]:
    """From half of ``length`` up to it, a quarter of the tokens in the batch being padding."""
    tokens = batch(shape, size, length, seed)
    keep = torch.linspace(length // 2, length, size).round().long()
    real = torch.arange(length) < keep[:, None]
    labels = tokens["labels"]
    if shape.family not in ("t5", "bart", "bert"):  # the targets move to where the text now ends
        target = real & (torch.arange(length) >= keep[:, None] - TARGET_TOKENS)
        labels = torch.where(target, tokens["input_ids"], -100)
    return {
        "input_ids": tokens["input_ids"] * real,
        "attention_mask": tokens["attention_mask"] * real,
        "labels": labels,
    }


def _step(editor, batches: tuple, **options) -> list[torch.Tensor]:
    editor.zero_grad()
    total, _ = editor_loss(editor, *batches, **options)
    total.backward()
    return [total.detach(), *(parameter.grad.clone() for parameter in editor.parameters())]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step(contest, case):
    """Loss and gradients of ragged texts. mendfast: warm cache, padding left out."""
    shape, editor, dtype = _editor(contest, case)
    size = contest.amount(case.size)
    cache = PrefixCache(editor.model, editor.layers, CACHE_BYTES)

    def data(seed: int) -> tuple:
        texts, length = LOCALITY.get(shape.name, (1, LOCALITY_TOKENS))
        sizes = ((size, 20), (size, 20), (texts * size, length))
        made = (_ragged(shape, *drawn, seed=3 * seed + i) for i, drawn in enumerate(sizes))
        return tuple(to_device(tokens, contest.device) for tokens in made)

    def warm(batches: tuple) -> tuple:
        for tokens in batches:
            with cache.replayed(tokens, final=tokens is batches[2]):
                pass
        return batches

    def forget(batches: tuple) -> tuple:
        cache.clear()
        return batches

    if dtype == torch.float32:
        first = warm(data(0))
        plain = _step(editor, first, pack=False)
        for options in ({"pack": True}, {"pack": True, "cache": cache}):
            error = relative_error(_step(editor, first, **options), plain)
            assert error <= 1e-2, f"with {options} the step differs from the plain one by {error:.1e}"
    contestants = {
        "mendfast": Contestant(lambda b: _step(editor, b, cache=cache), warm),
        "padded": Contestant(lambda b: _step(editor, b, cache=cache, pack=False), warm),
        "cold cache": Contestant(lambda b: _step(editor, b, cache=cache), forget),
        "no cache": lambda b: _step(editor, b),
        "no cache, padded": lambda b: _step(editor, b, pack=False),
        f"({POSITIONS} positions)": Contestant(lambda b: _step(editor, b, cache=cache, loc_positions=POSITIONS), warm),
    }
    row = {"shape": case.shape.name, "edits": case.size, "dtype": str(dtype)[6:]}
    contest(row, data, contestants, reference=None, units=size)
    editor.zero_grad(set_to_none=True)
