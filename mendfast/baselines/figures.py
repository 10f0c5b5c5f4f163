"""What is measured of an edit, and means of many edits with their intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

FIGURES = {
    "edit_success": "share of the edits and their rephrasings answered with all target tokens, teacher-forced",
    "efficacy": "the same, of the edits alone",
    "generality": "the same, of the rephrasings alone",
    "token_accuracy": "share of an edit's target tokens that are the first choice, teacher-forced, mean over edits",
    "rouge_l": "ROUGE-L of the edits' generated answers against their targets (needs rouge-score)",
    "exact_match": "share of the edits whose generated answer is the target, but for case, articles and punctuation",
    "rephrase_exact_match": "the same, of the rephrasings",
    "contains": "share of the edits and their rephrasings with the target in the generated answer, as whole words",
    "first_sentence": "share of the edits whose generated answer's first sentence is the target",
    "never_stopped": "share of the edits and their rephrasings whose generated answer did not end by itself",
    "exact_match_plain": "exact_match, asked in plain text (of an editor whose form is chat)",
    "exact_match_chat": "exact_match, asked through the chat template (of an editor whose form is plain)",
    "exact_match_system": "exact_match, asked in a chat under a system prompt",
    "drawdown": "accuracy on locality inputs before the edit less that after it, teacher-forced",
    "unchanged": "share of the locality inputs whose generated answer is what it was before the edit",
    "unchanged_relation": "the same, of inputs of the edit's relation and other subjects",
    "unchanged_subject": "the same, of inputs of the edit's subject and other relations",
    "leaked": "share of the locality inputs whose generated answer has got a target of the edit in it, by the 12th "
    "token after it parts from what it was",
    "first_choice_changed": "share of the tokens of those answers before the edit that are no longer the first choice",
    "kl": "KL(before || after) at the first 16 tokens of those answers, mean over each input's, then over inputs",
    "ppl_drawdown": "perplexity of the locality inputs' answers in the data after the edit less that before it",
    "perplexity_rise": "perplexity of running text after the edit less that before it",
    "text_kl": "KL(before || after) on running text, mean over each text's tokens, then over texts",
    "portability": "share of the questions that follow from the edit answered right, teacher-forced",
    "portability_exact_match": "the same, of their generated answers, as exact_match",
    "premises": "share of the questions whether something is true that are answered right with yes or no",
    "already": "share of the edits whose target was the answer before, teacher-forced",
    "seconds": "wall time of the edit, all simultaneous ones together",
    "peak_bytes": "memory at the edit's peak beyond what was held before it",
}
"""What :func:`measure` gives, and means. Those that there is no data for are absent."""


@dataclass(frozen=True)
class Interval:
    """A mean over edits and its confidence interval."""

    mean: float
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, float | int]:
        return asdict(self)


def bootstrap(values: Sequence[float], *, seed: int = 0, resamples: int = 1000, level: float = 0.95) -> Interval:
    """The mean, with the percentile interval of means of resamples (Efron and Tibshirani 1993, section 13.3).

    The same values and seed give the same interval.

    Raises:
        ValueError: no values.
    """
    if not len(values):
        raise ValueError("There are no values to resample; pass at least one.")
    array = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = [array[rng.integers(len(array), size=len(array))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(array.mean()), float(low), float(high), len(array))


def summarise(rows: Sequence[Mapping[str, float | None]], *, seed: int = 0) -> dict[str, Interval]:
    """Each of :data:`FIGURES` over the edits that have it as a finite number; peaks are maxima, not means."""
    found = {}
    for name in FIGURES:
        values = [row[name] for row in rows if row.get(name) is not None and math.isfinite(row[name])]
        if values and name == "peak_bytes":
            found[name] = Interval(max(values), max(values), max(values), len(values))
        elif values:
            found[name] = bootstrap(values, seed=seed)
    return found
