"""How good an edit is: edit success, generality, drawdown, as Mitchell et al. (2022, section 2) define them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from . import ops
from .editor import MendEditor
from .generation import answer
from .labels import IGNORE
from .objective import Batch, Rows, nll, per_sample_mean, target_rows, to_device

if TYPE_CHECKING:
    from .baselines import System

Pair = tuple[str, str]


def all_correct(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Teacher-forced exact match of each sample's labels: [B] bool, on the CPU."""
    return _all_right(target_rows(model, batch), len(batch["input_ids"])).cpu()


def _all_right(rows: Rows, size: int) -> torch.Tensor:
    wrong = (rows.logits.argmax(-1) != rows.labels).long()
    return wrong.new_zeros(size).index_add(0, rows.sample, wrong) == 0


@torch.no_grad()
def correct(editor: MendEditor, pairs: Sequence[Pair], batch_size: int = 256) -> torch.Tensor:
    """Whether the model (as it is now, edits attached included) answers each prompt with its target: [N] bool."""
    found = []
    for start in range(0, len(pairs), batch_size):
        batch = to_device(editor.tokenize(pairs[start : start + batch_size]), editor.device)
        found.append(all_correct(editor.model, batch))
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.bool)


@torch.no_grad()
def losses(editor: MendEditor, pairs: Sequence[Pair]) -> torch.Tensor:
    """Mean negative log-likelihood of each target: [N]."""
    batch = to_device(editor.tokenize(pairs), editor.device)
    return nll(target_rows(editor.model, batch), len(pairs))


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
        editor: MendEditor,
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
    logits: torch.Tensor  # [K, V] at the target tokens
    nll: torch.Tensor  # [K]
    sample: torch.Tensor  # [K] int64: the pair that each token belongs to

    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood of a token."""
        return math.exp(min(self.nll.double().mean().item(), 700.0))  # where float64 ends


@torch.no_grad()
def tell(editor: MendEditor, pairs: Sequence[Pair], batch_size: int = 64) -> Told:
    """Ask the model, as it is now, for each target; everything is on the model's device."""
    found: list[Told] = []
    for start in range(0, len(pairs), batch_size):
        batch = to_device(editor.tokenize(pairs[start : start + batch_size]), editor.device)
        rows, size = target_rows(editor.model, batch), len(batch["input_ids"])
        losses = ops.token_nll_rows(rows.logits, rows.labels)
        found.append(Told(_all_right(rows, size), rows.logits, losses, rows.sample + start))
    return Told(*(torch.cat(parts) for parts in zip(*found, strict=True)))


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


def says(editor: MendEditor, pairs: Sequence[Pair]) -> list[bool]:
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
