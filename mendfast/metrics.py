"""What a model answers, and how good an edit is (Mitchell et al. 2022, section 2)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from . import ops
from .capture import frozen
from .editable import EditableModel
from .objective import Below, all_correct, target_rows, to_device

Pair = tuple[str, str]


@torch.no_grad()
def correct(editor: EditableModel, pairs: Sequence[Pair], batch_size: int = 256) -> torch.Tensor:
    """Whether the model (as it is now, edits attached included) answers each prompt with its target: [N] bool."""
    found = []
    for start in range(0, len(pairs), batch_size):
        batch = to_device(editor.tokenize(pairs[start : start + batch_size]), editor.device)
        found.append(all_correct(target_rows(editor.model, batch), len(batch["input_ids"])).cpu())
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.bool)


@dataclass
class Score:
    """Averages over edits, 0 to 1."""

    edit_success: float
    generality: float
    drawdown: float
    n: int
    lists: dict[str, list[float]] = field(default_factory=dict, repr=False)

    def to_dict(self) -> dict[str, float | int]:
        return {
            "edit_success": self.edit_success,
            "generality": self.generality,
            "drawdown": self.drawdown,
            "n": self.n,
        }


class Scorer:
    """Collects what edits did. Drawdown is the share of answers, right before the edit, that it lost,
    less the share, wrong before, that it mended (accuracy before minus accuracy after)."""

    def __init__(self) -> None:
        self._before: dict[Pair, float] = {}
        self.success: list[float] = []
        self.generality: list[float] = []
        self.drawdown: list[float] = []

    @torch.no_grad()
    def add(
        self,
        editor: EditableModel,
        edited: contextlib.AbstractContextManager,
        edits: Sequence[Pair],
        rephrased: Sequence[Pair],
        unrelated: Sequence[Pair],
    ) -> None:
        """Measure one edit, or several simultaneous ones, within the context ``edited``."""
        if new := [pair for pair in dict.fromkeys(unrelated) if pair not in self._before]:
            self._before |= dict(zip(new, correct(editor, new).float().tolist(), strict=True))
        before = torch.tensor([self._before[pair] for pair in unrelated])
        with edited:
            after = correct(editor, [*edits, *rephrased, *unrelated]).float()
        n, r = len(edits), len(rephrased)
        self.success.append(after[:n].mean().item())
        if r:
            self.generality.append(after[n : n + r].mean().item())
        if unrelated:
            self.drawdown.append((before - after[n + r :]).mean().item())

    def score(self) -> Score:
        def mean(values: list[float]) -> float:
            return sum(values) / len(values) if values else float("nan")

        return Score(
            mean(self.success),
            mean(self.generality),
            mean(self.drawdown),
            len(self.success),
            {"edit_success": self.success, "generality": self.generality, "drawdown": self.drawdown},
        )


# -- one edit of a system in figures -----------------------------------------------------------------------


class Told(NamedTuple):
    """What a model makes of N (prompt, target) pairs with K target tokens in all, teacher-forced."""

    correct: torch.Tensor  # [N] bool: every target token is the first choice
    logits: torch.Tensor  # [K, V] at the target tokens; [K, 0] where they were not asked for
    nll: torch.Tensor  # [K]
    sample: torch.Tensor  # [K] int64: the pair that each token belongs to
    choice: torch.Tensor  # [K] int64: the first choice at each token

    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood of a token."""
        return perplexity(self.nll)


def perplexity(nll: torch.Tensor) -> float:
    """exp of the mean of [K] negative log-likelihoods; finite, however large they are."""
    return math.exp(min(nll.double().mean().item(), 700.0))  # where float64 ends


@torch.no_grad()
def tell(
    editor: EditableModel,
    pairs: Sequence[Pair],
    batch_size: int = 64,
    *,
    logits: bool = True,
    below: Below = contextlib.nullcontext,
) -> Told:
    """Ask the model, as it is now, for each target; everything is on the model's device.

    ``logits``: whether to keep them, which of many pairs are much. ``below``: what each pass is made within.
    """
    found: list[Told] = []
    for start in range(0, len(pairs), batch_size):
        batch = to_device(editor.tokenize(pairs[start : start + batch_size]), editor.device)
        with frozen(editor.model), below(batch):
            rows, size = target_rows(editor.model, batch), len(batch["input_ids"])
        losses = ops.token_nll_rows(rows.logits, rows.labels)
        choice, kept = rows.logits.argmax(-1), rows.logits if logits else rows.logits.new_zeros(len(rows.logits), 0)
        found.append(Told(all_correct(rows, size), kept, losses, rows.sample + start, choice))
    return Told(*(torch.cat(parts) for parts in zip(*found, strict=True)))
