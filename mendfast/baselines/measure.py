"""One edit of a system in figures, and figures of many edits with their intervals."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import ops
from ..editable import EditableModel
from ..generation import answer
from ..labels import IGNORE
from ..metrics import Pair, tell
from ..objective import per_sample_mean
from .system import System


@dataclass
class Outcome:
    """What :func:`measure` saw of one edit."""

    figures: dict[str, float]
    shown: list[tuple[str, str, str]]
    """Prompt, answer before, answer after."""


FIGURES = {
    "edit_success": "share of the edits and their rephrasings answered with all target tokens, teacher-forced",
    "efficacy": "the same, of the edits alone",
    "generality": "the same, of the rephrasings alone",
    "autoregressive": "share of the edits and their rephrasings whose greedy generation is the target",
    "drawdown": "accuracy on locality inputs before the edit less that after it",
    "ppl_drawdown": "perplexity of the locality inputs' answers after the edit less that before it",
    "kl": "KL(before || after) at the answers of locality inputs, mean over each input's tokens, then over inputs",
    "portability": "share of the questions that follow from the edit answered right, teacher-forced",
    "already": "share of the edits whose target was the answer before",
    "seconds": "wall time of the edit, all simultaneous ones together",
    "peak_bytes": "memory at the edit's peak beyond what was held before it",
}
"""What :func:`measure` gives, and means. Those that there is no data for are absent."""


def measure(
    system: System,
    requests: Sequence[Pair],
    rephrasings: Sequence[Pair] = (),
    locality: Sequence[Pair] = (),
    portability: Sequence[Pair] = (),
    *,
    show: Sequence[str] = (),
    generate: bool = True,
) -> Outcome:
    """Make one edit, or several simultaneous ones, ask, and take it back; :data:`FIGURES` says what comes out.

    Edit success is that of Mitchell et al. (2022, section 2), over an edit and its equivalents; perplexity
    drawdown is theirs for generation, accuracy drawdown theirs for the other tasks. ``before`` is the system's
    own model (that of ENN is another than the others').

    Args:
        requests: (prompt, target) of the edit.
        rephrasings: other wordings of the prompts, each with its target.
        locality: prompts that the edit must leave alone, with the answers to judge by.
        portability: questions whose answers follow from the edit.
        show: prompts to answer by greedy decoding, before and after.
        generate: also compare what greedy decoding says, which takes a pass for each token.

    Raises:
        ValueError: no requests; whatever the system's edit raises.
    """
    editor, n, r = system.subject, len(requests), len(rephrasings)
    before = tell(editor, requests)
    base = tell(editor, locality) if locality else None
    said = answer(editor, show) if show else []
    with contextlib.ExitStack() as stack:
        with PeakMemory(editor.device) as memory:
            stack.enter_context(system.edit(requests))
        asked = tell(editor, [*requests, *rephrasings, *portability]).correct.float()
        figures = {
            "edit_success": asked[: n + r].mean().item(),
            "efficacy": asked[:n].mean().item(),
            "already": before.correct.float().mean().item(),
            "seconds": system.seconds,
        }
        if r:
            figures["generality"] = asked[n : n + r].mean().item()
        if portability:
            figures["portability"] = asked[n + r :].mean().item()
        if memory.bytes is not None:
            figures["peak_bytes"] = memory.bytes
        if base is not None:
            after = tell(editor, locality)
            figures["drawdown"] = (base.correct.float() - after.correct.float()).mean().item()
            figures["ppl_drawdown"] = after.perplexity() - base.perplexity()
            divergence = ops.kl_divergence_rows(base.logits, after.logits)
            figures["kl"] = per_sample_mean(divergence, base.sample, len(locality)).mean().item()
        if generate:
            spoken = says(editor, [*requests, *rephrasings])
            figures["autoregressive"] = sum(spoken) / len(spoken)
        now = answer(editor, show) if show else []
    return Outcome(figures, list(zip(show, said, now, strict=True)))


def says(editor: EditableModel, pairs: Sequence[Pair]) -> list[bool]:
    """Whether greedy generation gives each target, as text.

    Where the model's answers end (an encoder-decoder's, a decoder-only model's with ``append_eos``) the answer
    must be the target; where they run on it must begin with the target, up to a word's end. All target tokens
    being the first choice, teacher-forced, makes them the greedy ones, so what this adds is that the model
    stops, and that a target spelled in other tokens counts.
    """
    if editor.kind == "classifier":
        answers = answer(editor, [prompt for prompt, _ in pairs])
        return [a.lower() == target.strip().lower() for a, (_, target) in zip(answers, pairs, strict=True)]
    stops = editor.config.append_eos or editor.kind == "encoder-decoder"
    found = []
    for prompt, target in pairs:
        labels = [label for label in editor.encode(prompt, target)["labels"] if label != IGNORE]
        wanted = editor.tokenizer.decode(labels, skip_special_tokens=True).strip()
        (given,) = answer(editor, [prompt], max_new_tokens=len(labels) + 1)
        rest = given[len(wanted) :]
        found.append(given.startswith(wanted) and (not rest if stops else not rest[:1].isalnum()))
    return found


class PeakMemory:
    """Measures, as a context, the bytes held at the peak beyond those held on entering.

    On a GPU they are PyTorch's; on a CPU the growth of the resident set (Linux), which memory that the allocator
    had kept back does not show in: of many edits the largest counts. ``bytes`` is None where neither is known.
    """

    def __init__(self, device: torch.device):
        self.device, self.bytes = device, None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
            self._start = _resident("VmRSS")
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._start
        elif self._start is not None:
            self.bytes = max(0, _resident("VmHWM") - self._start)


def _resident(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)


# -- many edits --------------------------------------------------------------------------------------------


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
