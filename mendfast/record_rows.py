"""The rows of a memory's records, made many at a time."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence

import torch

from . import ops
from .editor import MendEditor
from .objective import Batch
from .requests import EditRequest
from .shared_prefix import SharedPrefix

TOKENS_PER_PASS = 1024
_WINDOW = 256  # edits that are sorted by length together,
_TREES = 4096  # or by what they begin with
_TRIED = 8  # edits, of which some show whether the model takes a tree of texts

Rows = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""u and d of each layer."""


class Maker:
    """Makes the rows of ``requests``, all of which the editor's model can learn.

    They go through the model as a tree (:mod:`mendfast.tree`), those together that begin alike; where it takes none,
    form by form, those together that are of a length, what all of a form begin with run once.
    """

    def __init__(self, editor: MendEditor, requests: Sequence[EditRequest]):
        self.editor = editor
        self.as_tree = editor.as_tree(editor.tokenize_edits(requests[:_TRIED]))
        self.shared: dict[str | None, SharedPrefix | None] = {}
        if not self.as_tree:
            self.shared = {form: self._shared(requests, form) for form in editor.forms}

    def _shared(self, requests: Sequence[EditRequest], form: str | None) -> SharedPrefix | None:
        if self.editor.kind != "causal":
            return None
        texts = [self.editor.encode(*request, form)["input_ids"] for request in requests]
        return SharedPrefix.of(self.editor.model, self.editor.layers, texts)

    def passes(self, requests: Mapping[str, EditRequest], batch_size: int | None) -> Iterator[Sequence[str]]:
        """The keys of those that go through the model together."""
        left, width = list(requests), _TREES if self.as_tree else _WINDOW
        for start in range(0, len(left), width):
            window = left[start : start + width]
            costs = self._begun_alike(window, requests) if self.as_tree else self._of_a_length(window, requests)
            while window:
                keys = self._first(window, costs, batch_size)
                yield keys
                del window[: len(keys)]

    def _begun_alike(self, window: list[str], requests: Mapping[str, EditRequest]) -> dict[str, tuple[int, int]]:
        """Sort ``window``; each one's tokens, and those of them that the one before has not."""
        forms = self.editor.forms
        ids = {key: [self.editor.encode(*requests[key], form)["input_ids"] for form in forms] for key in window}
        window.sort(key=ids.__getitem__)
        costs = {key: (total := sum(map(len, texts)), total) for key, texts in ids.items()}
        for before, key in itertools.pairwise(window):
            common = sum(len(os.path.commonprefix(list(pair))) for pair in zip(ids[before], ids[key], strict=True))
            costs[key] = costs[key][0], costs[key][0] - common
        return costs

    def _of_a_length(self, window: list[str], requests: Mapping[str, EditRequest]) -> dict[str, tuple[int, int]]:
        """Sort ``window``; each one's tokens in its longest form."""
        lengths = {key: self.editor.tokenize_edits([requests[key]])["input_ids"].shape[1] for key in window}
        window.sort(key=lengths.__getitem__)
        return {key: (length, length) for key, length in lengths.items()}

    def _first(
        self, window: Sequence[str], costs: Mapping[str, tuple[int, int]], batch_size: int | None
    ) -> Sequence[str]:
        if self.editor.config.loss_reduction == "batch":  # by tokens of the whole batch, an edit's weight depends on
            return window[:1]  # the others
        if batch_size is not None:
            return window[:batch_size]
        count, tokens = 1, costs[window[0]][0]
        for key in window[1:]:
            tokens = tokens + costs[key][1] if self.as_tree else (count + 1) * costs[key][1]  # the others are padded
            if tokens > TOKENS_PER_PASS:
                break
            count += 1
        return window[:count]

    def rows_of(self, requests: Sequence[EditRequest]) -> list[Rows]:
        """Each request's rows at every layer, in all forms; a ValueError where they are not finite."""
        if self.as_tree:
            return self._made(self.editor.tokenize_edits(requests), len(requests))
        made = []
        for form in self.editor.forms:
            batch = self.editor.tokenize([(*request, form) for request in requests])
            shared = self.shared[form]
            with contextlib.nullcontext() if shared is None else shared.replayed(batch):
                made.append(self._made(batch, len(requests)))
        return [
            {name: tuple(map(torch.cat, zip(*(part[name] for part in parts), strict=True))) for name in parts[0]}
            for parts in zip(*made, strict=True)
        ]

    def _made(self, batch: Batch, count: int) -> list[Rows]:
        """Of ``count`` requests, in as many forms as ``batch`` has of each."""
        wanted, forms = self.editor.wanted(batch), len(batch["labels"]) // count
        rows: list[Rows] = [{} for _ in range(count)]
        for name, (u, d, sample) in wanted.items():
            if not (ops.all_finite(u) and ops.all_finite(d)):
                raise ValueError(
                    f"its rows at {name} hold NaN or infinity: the model's activations on it are not finite in "
                    "float32. Check the model, or load it in float32 or bfloat16."
                )
            counts = torch.bincount(sample // forms, minlength=count).tolist()
            sides = (side.float().cpu().split(counts) for side in (u, d))
            for mine, pair in zip(rows, zip(*sides, strict=True), strict=True):
                mine[name] = tuple(side.clone() for side in pair)  # a view would keep the whole batch
        return rows
