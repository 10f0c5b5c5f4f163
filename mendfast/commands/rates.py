"""Rates and steps of the systems that have some, chosen on edits that no table measures, by one budget for all."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from ..baselines import System
from ..baselines.fine_tuning import FineTuning, FineTuningBreadthFirst
from ..baselines.measure import Before
from ..baselines.ultraedit import UltraEdit
from ..generation import follow
from ..metrics import tell
from ..tasks.records import Example
from ..training.processes import Processes
from .questions import Questions

TRIALS = 6
"""Of each system."""
RATES = {
    FineTuning: (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    UltraEdit: (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2),
}
OTHERS, ANSWERED = 8, 16
"""Unrelated questions after each edit, and the tokens of their answers that must stay."""


def chosen_by(kind: type[System], fixed: Sequence[str] = ()) -> tuple[tuple[float, ...], str | None]:
    """The rates that a kind of system may take, and the name of its steps; none of what is ``fixed``."""
    rates = next((found for base, found in RATES.items() if issubclass(kind, base)), ())
    steps = None
    if issubclass(kind, FineTuning):
        steps = "epochs" if issubclass(kind, FineTuningBreadthFirst) else "max_steps"
    return () if "learning_rate" in fixed else rates, None if steps in fixed else steps


class Choice:
    """Chooses for one system after another; each trial is a rate, the last, of fine-tuning, a quarter of the steps.

    The best has the largest harmonic mean of two shares: of validation edits and their rephrasings answered right
    (teacher-forced), and of the first tokens of unrelated answers that stay the first choice. (Not of answers that stay
    whole: where every rate that edits touches all of them, one that does nothing would be the best.) Of equal ones the
    one that leaves the most answers whole is taken, then the first.

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
        self.processes, self.in_turn, self.edits = processes, in_turn, len(examples)
        groups = [list(examples)] if at_once or in_turn else [[example] for example in examples]
        self.groups = [[part for example in group for part in example.parts] for group in groups]
        self.asked = []
        for i, group in enumerate(self.groups):
            asked = questions.after(group, random.Random(f"{seed}:validation:{i}"), brief=True)
            self.asked.append((asked["rephrasings"], [prompt for prompt, _ in asked["locality"][:OTHERS]]))

    def choose(self, system: System, before: Before, fixed: Sequence[str] = ()) -> dict[str, Any] | None:
        """Set ``system``'s rate and steps; what was chosen, and what that took. None where there is nothing to."""
        rates, steps = chosen_by(type(system), fixed)
        trials: list[dict[str, Any]] = [{"learning_rate": rate} for rate in rates]
        if not trials and not steps:
            return None
        started = time.perf_counter()
        own = {"learning_rate": system.learning_rate} | ({steps: getattr(system, steps)} if steps else {})
        bar = tqdm(total=TRIALS, desc=f"{system.name}, rates", disable=None if self.processes.main else True)
        with bar:
            scores = self._scores(system, before, trials or [{}], bar)
            best = max(range(len(scores)), key=lambda i: (scores[i], -i))
            found = {**own, **(trials or [{}])[best]}
            tried = len(scores)
            if steps and getattr(system, steps) >= 4:
                fewer = {**found, steps: getattr(system, steps) // 4}
                (score,) = self._scores(system, before, [fewer], bar)
                tried += 1
                found = fewer if score > scores[best] else found
        _set(system, found)
        return {**found, "trials": tried, "edits": self.edits, "seconds": round(time.perf_counter() - started, 1)}

    def _scores(
        self, system: System, before: Before, trials: Sequence[dict[str, Any]], bar: tqdm
    ) -> list[tuple[float, float]]:
        """Of each trial; each process makes its share of them."""
        mine = {}
        for i in range(self.processes.rank, len(trials), self.processes.count):
            _set(system, trials[i])
            try:
                mine[i] = self._score(system, before)
            except (ValueError, RuntimeError, ArithmeticError):  # a rate that breaks the model, a fact too long
                mine[i] = (0.0, 0.0)
            bar.update()
        found = {i: score for part in self.processes.objects(mine) for i, score in part.items()}
        return [found[i] for i in range(len(trials))]

    def _score(self, system: System, before: Before) -> tuple[float, float]:
        right, kept, same, tokens = [], [], 0, 0
        below = before.below(system)
        for group, (rephrasings, others) in zip(self.groups, self.asked, strict=True):
            requests = [(example.prompt, example.target) for example in group]
            said = before.answers(others, ANSWERED)
            with system.edit(requests, in_turn=self.in_turn):
                pairs = [*requests, *rephrasings]
                right += tell(system.subject, pairs, logits=False, below=below).correct.tolist()
                if others:
                    rows = follow(system.subject, others, [answer.ids for answer in said], below=below)
                    chosen = rows.logits.argmax(-1)
                    wrong = torch.bincount(rows.sample[chosen != rows.labels], minlength=len(others))
                    kept += (wrong == 0).tolist()
                    same += int((chosen == rows.labels).sum())
                    tokens += len(chosen)
        success, stays = sum(right) / len(right), same / tokens if tokens else 1.0
        mean = 2 * success * stays / (success + stays) if success + stays else 0.0
        return mean, sum(kept) / len(kept) if kept else 1.0


def _set(system: System, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(system, name, value)
