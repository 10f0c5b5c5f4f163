"""Edits whose answers are generated together: a model's step costs little more for many rows than for one."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from ..baselines import System
from ..baselines.asking import Asking, answer_together
from ..generation import Answer

Measuring = Generator[Asking, list[Answer], dict[str, Any]]
TOGETHER = 8
"""Edits that wait for each other, at most."""
FAILURES = (ValueError, RuntimeError, ArithmeticError)
"""Of the data, of memory: not of the program."""
HELD = 1 << 30
"""Bytes of edited weights that may wait."""


class Pending:
    """Measured edits of one system that have been taken back and wait for their answers.

    Args:
        take: is given each edit's place and line, when it is whole.
    """

    def __init__(self, system: System, take: Callable[[dict[str, Any], dict[str, Any]], None]):
        self.system, self.take = system, take
        self._waiting: list[tuple[dict[str, Any], Measuring, Asking]] = []

    def add(self, place: dict[str, Any], measuring: Measuring) -> None:
        """Begin a measurement."""
        try:
            asking = next(measuring)
        except StopIteration as whole:
            self.take(place, whole.value)
            return
        self._waiting.append((place, measuring, asking))
        held = sum(w.nbytes for *_, asking in self._waiting for w in (asking.weights or {}).values())
        if len(self._waiting) >= TOGETHER or held >= HELD:
            self.flush()

    def flush(self) -> None:
        """Answer what waits."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        layers = self.system.changed_layers() or ()
        try:
            together = answer_together([asking for *_, asking in waiting], layers)
        except FAILURES:
            together = []
        for i, (place, measuring, asking) in enumerate(waiting):
            try:
                try:
                    answers = together[i] if together else answer_together([asking], layers)[0]
                except FAILURES as error:  # of this one
                    measuring.throw(error)
                else:
                    measuring.send(answers)
            except StopIteration as whole:
                self.take(place, whole.value)
