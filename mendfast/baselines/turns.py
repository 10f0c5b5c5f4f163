"""What a long sequence of edits has come to, kept in a file now and then, so that one that was cut off goes on."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..files import read_tensors, write_tensors
from ..requests import EditRequest
from ..schema import differences

EVERY = 20.0
"""Seconds between two writings."""
KIND = "turns"


class Turns:
    """One sequence's file.

    Attributes:
        seconds: what earlier runs took for the edits that are in the file.
    """

    def __init__(self, path: str | Path):
        self.path, self.seconds = Path(path), 0.0
        self._started = self._kept = time.perf_counter()
        self._digest = ""

    @property
    def memory(self) -> Path:
        """Where a system keeps its edits whose state is a memory of them."""
        return self.path.with_suffix(".memory.safetensors")

    def resume(self, requests: Sequence[EditRequest]) -> tuple[int, dict[str, torch.Tensor]]:
        """How many of ``requests`` an earlier run has made, and the state that it has come to."""
        self._digest = hashlib.sha256(repr([(r.prompt, r.target) for r in requests]).encode()).hexdigest()
        self._started = self._kept = time.perf_counter()
        self.seconds = 0.0
        try:
            tensors, metadata = read_tensors(self.path, KIND)
        except FileNotFoundError:
            return 0, {}
        if metadata.get("requests") != self._digest:
            return 0, {}
        try:
            done, self.seconds = int(metadata["done"]), float(metadata["seconds"])
        except (KeyError, ValueError) as error:
            raise self._damaged() from error
        if not 0 < done <= len(requests) or not 0 <= self.seconds < math.inf:
            raise self._damaged()
        return done, tensors

    def _damaged(self) -> ValueError:
        return ValueError(f"{self.path} holds no whole sequence of edits; remove it, and the sequence starts anew.")

    def due(self, done: int, of: int) -> bool:
        """Whether the state is to be written: from time to time, and at the end."""
        return done == of or time.perf_counter() - self._kept > EVERY

    def keep(self, done: int, state: Mapping[str, torch.Tensor]) -> None:
        """Write what ``done`` requests have come to."""
        seconds = self.seconds + time.perf_counter() - self._started
        metadata = {"format": f"mendfast.{KIND}", "format_version": "1", "requests": self._digest}
        write_tensors(self.path, state, metadata | {"done": str(done), "seconds": repr(seconds)})
        self._kept = time.perf_counter()

    def forget(self) -> None:
        """Remove the files."""
        for path in (self.path, self.memory):
            path.unlink(missing_ok=True)
        if self.path.parent.is_dir() and not any(self.path.parent.iterdir()):
            self.path.parent.rmdir()


def take(weights: Sequence[torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
    """Write the state's numbered tensors into ``weights``; a ValueError, before that, where they don't fit."""
    expected = {name: weight.shape for name, weight in numbered(weights).items()}
    if wrong := differences({name: state[name].shape for name in expected if name in state}, expected):
        raise ValueError(f"A kept sequence of edits is of other weights ({wrong[0]}); remove it, and it starts anew.")
    with torch.no_grad():
        for i, weight in enumerate(weights):
            weight.copy_(state[f"weight.{i}"])


def numbered(weights: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """What :func:`take` reads."""
    return {f"weight.{i}": weight for i, weight in enumerate(weights)}
