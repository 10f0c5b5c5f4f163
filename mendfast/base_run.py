"""What a base model's training keeps beside it, so that an interrupted one goes on where it was, to the bit."""

from __future__ import annotations

import json
import logging
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .files import read_tensors, write_tensors
from .schema import check_object, check_settings, differences, parse_json
from .stopping import Stopping

log = logging.getLogger("mendfast")

MINUTES = 10.0  # between two times that a run is kept
_KIND = "base_run"
_STATES = {"AdamW": ("exp_avg", "exp_avg_sq"), "Orthogonal": ("moment",)}


class BaseRun:
    """A base model's training, kept in one file while it lasts: at every signal, and every few minutes.

    Args:
        path: the file; :meth:`done` removes it.
        made_of: what makes the run what it is, as JSON takes it; a run of something else is refused.
    """

    def __init__(self, path: str | Path, made_of: Mapping[str, Any], minutes: float = MINUTES):
        self.path, self.made_of, self.minutes = Path(path), dict(made_of), minutes
        self._kept = time.monotonic()

    def resume(self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> int:
        """Give model and optimisers what they held, and say after how many steps; 0 where there is nothing.

        Raises:
            ValueError: the run in the file was made of something else, or the file is damaged.
        """
        if not self.path.is_file():
            return 0
        tensors, found = read_tensors(self.path, _KIND)
        before = check_object(parse_json(found.get("made_of", ""), str(self.path)), str(self.path))
        check_settings(
            f"{self.path} holds a base model's unfinished training",
            before, self.made_of, "pass the same ones, start anew with --restart, or choose another --output.",
        )  # fmt: skip
        step, places = before.get("step"), self._places(model, optimizers)
        wrong = differences({name: t.shape for name, t in tensors.items()}, {n: t.shape for n, t in places.items()})
        if wrong or any(tensors[name].dtype != place.dtype for name, place in places.items()):
            raise self._damaged()
        if type(step) is not int or not 1 <= step <= before.get("steps", step):
            raise self._damaged()
        try:
            torch.set_rng_state(tensors["rng"])
        except RuntimeError as error:
            raise self._damaged() from error
        with torch.no_grad():
            for name, place in places.items():
                place.copy_(tensors[name])
        return step

    def _damaged(self) -> ValueError:
        return ValueError(f"{self.path} is no whole training of this base model; remove it, and it starts anew.")

    def keep(self, step: int, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Write the file anew: the run after ``step`` steps."""
        write_tensors(
            self.path,
            self._places(model, optimizers),
            {"format": f"mendfast.{_KIND}", "format_version": "1",
             "made_of": json.dumps({**self.made_of, "step": step})},
        )  # fmt: skip
        self._kept = time.monotonic()

    def after_step(
        self, step: int, steps: int, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], stopping: Stopping
    ) -> None:
        """Keep the run where it is time; where a signal came, keep it, say so, and let the signal do what it does."""
        asked = stopping.asked
        if asked is None and time.monotonic() - self._kept < 60 * self.minutes:
            return
        self.keep(step, model, optimizers)
        if asked is not None:
            log.warning(
                "base model: %s after step %d of %d; it is kept in %s. The same command goes on there.",
                signal.Signals(asked).name, step, steps, self.path,
            )  # fmt: skip
            stopping.hand_over()

    def done(self) -> None:
        self.path.unlink(missing_ok=True)

    @staticmethod
    def _places(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
        """Every tensor that a run is made of, by name; of an optimiser that took no step yet, as its first will
        leave them."""
        places: dict[str, torch.Tensor] = {f"model:{name}": p.detach() for name, p in model.named_parameters()}
        places["rng"] = torch.get_rng_state()
        for i, optimizer in enumerate(optimizers):
            moments = _STATES[type(optimizer).__name__]
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for j, parameter in enumerate(parameters):
                state = optimizer.state[parameter]
                for name in moments:
                    places[f"{i}:{j}:{name}"] = state.setdefault(name, torch.zeros_like(parameter))
                if len(moments) > 1:
                    places[f"{i}:{j}:step"] = state.setdefault("step", torch.zeros(()))
        return places
