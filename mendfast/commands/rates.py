"""Rates and steps of the systems that have some, chosen on edits that no table measures, by one budget for all."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from ..baselines import System
from ..baselines.fine_tuning import FineTuning, FineTuningBreadthFirst
from ..baselines.measure import Before
from ..baselines.mend import Mend
from ..baselines.rome import Memit
from ..baselines.ultraedit import UltraEdit
from ..generation import Answer, answer, follow
from ..metrics import tell
from ..objective import Below
from ..tasks.records import Example
from ..training.processes import Processes
from .questions import Questions

TRIALS = 6
"""Of each system."""
RATES = {
    FineTuning: (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    UltraEdit: (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2),
    Memit: (0.1, 1.0, 10.0, 100.0, 1e3, 1e4),
    Mend: (1.0, 2.0, 4.0, 8.0, 16.0),
}
"""Of MEMIT the weight of C; of MEND too, where edits are made at once: it has learned one for all sizes."""
NAMES = ("learning_rate", "weight", "max_steps", "epochs")
"""Of what may be chosen."""
OTHERS, ANSWERED = 8, 16
"""Unrelated questions after each edit, and the tokens of their answers that must stay."""
HALVED = 4
"""Validation edits from which on not all rates are tried on all of them."""


def chosen_by(
    kind: type[System], fixed: Sequence[str] = (), *, at_once: bool = False
) -> tuple[list[dict[str, float]], str | None]:
    """The rates that a kind of system may take, each with its name, and the name of its steps; none of what is
    ``fixed``."""
    name = "weight" if issubclass(kind, (Memit, Mend)) else "learning_rate"
    rates = next((found for base, found in RATES.items() if issubclass(kind, base)), ())
    if issubclass(kind, Mend) and not (kind.fitted and at_once):
        rates = ()
    steps = None
    if issubclass(kind, FineTuning):
        steps = "epochs" if issubclass(kind, FineTuningBreadthFirst) else "max_steps"
    return [] if name in fixed else [{name: rate} for rate in rates], None if steps in fixed else steps


@dataclass
class Tally:
    """What a trial has been seen to do, over validation edits."""

    right: list[bool] = field(default_factory=list)
    kept: list[bool] = field(default_factory=list)
    same: int = 0
    tokens: int = 0
    steps: int = 0
    """The most that an edit took."""
    error: str = ""
    """Of an edit that failed, and with it the trial."""

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.right + other.right, self.kept + other.kept, self.same + other.same, self.tokens + other.tokens,
            max(self.steps, other.steps),
        )  # fmt: skip

    def score(self) -> tuple[float, float]:
        """The harmonic mean that is looked at, and the share of answers left whole."""
        if not self.right:  # it broke the model
            return 0.0, 0.0
        success, stays = sum(self.right) / len(self.right), self.same / self.tokens if self.tokens else 1.0
        mean = 2 * success * stays / (success + stays) if success + stays else 0.0
        return mean, sum(self.kept) / len(self.kept) if self.kept else 1.0


class Choice:
    """Chooses for one system after another; each trial is a rate, the last, of fine-tuning, a quarter of the steps.

    The best has the largest harmonic mean of two shares: of validation edits and their rephrasings answered right
    (teacher-forced), and of the first tokens of unrelated answers that stay the first choice. (Not of answers that stay
    whole: where every rate that edits touches all of them, one that does nothing would be the best.) Of equal ones the
    one that leaves the most answers whole is taken, then the first.

    Of :data:`HALVED` or more validation edits a quarter is tried with all rates, and whenever the edits are doubled the
    better half of the rates goes on (successive halving).

    Args:
        examples: validation edits.
        at_once: make them together, as a table of simultaneous edits does; in_turn: one after the other.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        questions: Questions,
        processes: Processes,
        *,
        at_once: bool = False,
        in_turn: bool = False,
        seed: int = 0,
    ):
        self.processes, self.at_once, self.in_turn, self.examples = processes, at_once, in_turn, list(examples)
        groups = [list(examples)] if at_once or in_turn else [[example] for example in examples]
        self.groups = [[part for example in group for part in example.parts] for group in groups]
        self.asked = []
        for i, group in enumerate(self.groups):
            asked = questions.after(group, random.Random(f"{seed}:validation:{i}"), brief=True)
            self.asked.append((asked["rephrasings"], [prompt for prompt, _ in asked["locality"][:OTHERS]]))

    def choose(self, system: System, before: Before, fixed: Sequence[str] = ()) -> dict[str, Any] | None:
        """Set ``system``'s rate and steps; what was chosen, and what that took. None where there is nothing to."""
        trials, steps = chosen_by(type(system), fixed, at_once=self.at_once)
        if not (trials or steps) or isinstance(system, Mend) and system.weight is None:
            return None
        started = time.perf_counter()
        given = [*chosen_by(type(system), at_once=self.at_once)[0][0], *([steps] if steps else [])]
        own = {name: getattr(system, name) for name in given}
        bar = tqdm(total=TRIALS, desc=f"{system.name}, rates", disable=None if self.processes.main else True)
        with bar, system.remembering():
            found, tally, tried = self._best(system, before, [own | trial for trial in trials or [{}]], bar)
            if tally.error:
                _set(system, own)
                if self.processes.main:
                    said = f"No rate of {system.name} could be tried, so it keeps its own: {tally.error}"
                    warnings.warn(said, stacklevel=2)
                return None
            if steps and getattr(system, steps) >= 4:
                fewer = {**found, steps: getattr(system, steps) // 4}
                tried += 1
                # with none that takes so many steps it would be the same again
                if self.in_turn or not 0 < tally.steps <= fewer[steps]:
                    (other,) = self._trials(system, before, [fewer], range(len(self.groups)), bar)
                    found = fewer if other.score() > tally.score() else found
        _set(system, found)
        seconds = round(time.perf_counter() - started, 3)
        return {**found, "trials": tried, "edits": len(self.examples), "seconds": seconds}

    def _best(
        self, system: System, before: Before, trials: list[dict[str, Any]], bar: tqdm
    ) -> tuple[dict[str, Any], Tally, int]:
        """The best of the trials, what it did, and how many there were."""
        tried, count = len(trials), len(self.groups)
        tallies = [Tally() for _ in trials]
        done, until = 0, count if count < HALVED else max(1, count // 4)
        while True:
            found = self._trials(system, before, trials, range(done, until), bar)
            tallies = [old + new if new.right else new for old, new in zip(tallies, found, strict=True)]
            order = sorted(range(len(trials)), key=lambda i: (tallies[i].score(), -i), reverse=True)
            if until == count:
                return trials[order[0]], tallies[order[0]], tried
            kept = sorted(order[: -(-len(order) // 2)])
            trials, tallies = [trials[i] for i in kept], [tallies[i] for i in kept]
            done, until = until, min(2 * until, count)

    def _trials(
        self, system: System, before: Before, trials: Sequence[dict[str, Any]], groups: Sequence[int], bar: tqdm
    ) -> list[Tally]:
        """What each trial does to these groups. The processes share the groups, of which each keeps to its own: what is
        remembered of them serves all trials. Of one group alone they share the trials."""
        count, rank = self.processes.count, self.processes.rank
        mine: dict[int, Tally] = {}
        for i, trial in enumerate(trials):
            own = [group for group in groups if (group if len(self.groups) > 1 else i) % count == rank]
            if not own:
                continue
            _set(system, trial)
            try:
                mine[i] = self._tally(system, before, own)
            except (ValueError, RuntimeError, ArithmeticError) as error:  # it breaks the model, a fact is too long
                mine[i] = Tally(error=str(error) or type(error).__name__)
            bar.update(len(own) * count / len(self.groups))
        shares = self.processes.objects(mine)
        return [_sum([share[i] for share in shares if i in share]) for i in range(len(trials))]

    def _tally(self, system: System, before: Before, groups: Iterable[int]) -> Tally:
        found = Tally()
        below = before.below(system)
        for i in groups:
            group, (rephrasings, others) = self.groups[i], self.asked[i]
            requests = [(example.prompt, example.target) for example in group]
            said = before.answers(others, ANSWERED)
            with system.edit(requests, in_turn=self.in_turn):
                found.steps = max(found.steps, getattr(system, "steps", 0))
                pairs = [*requests, *rephrasings]
                found.right += tell(system.subject, pairs, logits=False, below=below).correct.tolist()
                if others:
                    stays, sample = _stays(system, others, said, below)
                    found.kept += (torch.bincount(sample[~stays], minlength=len(others)) == 0).tolist()
                    found.same += int(stays.sum())
                    found.tokens += len(stays)
        return found


def _stays(
    system: System, prompts: Sequence[str], said: Sequence[Answer], below: Below
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each token of what was said [K] whether it is still the model's first choice, and the prompt that it answers;
    of a classifier its classes."""
    if system.subject.kind == "classifier":
        now = answer(system.subject, prompts)
        same = torch.tensor([one == before.text for one, before in zip(now, said, strict=True)])
        return same, torch.arange(len(same))
    rows = follow(system.subject, prompts, [before.ids for before in said], below=below)
    return rows.logits.argmax(-1) == rows.labels, rows.sample


def _sum(tallies: Sequence[Tally]) -> Tally:
    """Of all groups; nothing but the error where one of them failed."""
    return next((tally for tally in tallies if tally.error), None) or sum(tallies, Tally())


def _set(system: System, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(system, name, value)
