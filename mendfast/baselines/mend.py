"""MEND itself, its ablations (Mitchell et al. 2022, section 5), and the editor that was never trained."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ..config import MendConfig
from ..editor import MendEditor
from ..layers import Layer
from ..memory import EditMemory
from ..metric import Metric
from ..moments import SecondMoment
from ..requests import EditRequest
from ..training import Sampler, TrainConfig, Trainer
from .system import System
from .ultraedit import isotropic

AT_A_TIME = 16  # edits between two looks at whether to keep what is done


class Mend(System):
    """MEND: ``subject`` is the editor.

    Args:
        subject: see :class:`System`.
        weight: of C, beside what an editor by least squares has learned of it; one by sums has none.
        rounds: of weighing, instead of as many as the editor's configuration says (:mod:`mendfast.weighing`).
    """

    key, name = "mend", "MEND"
    changes: ClassVar[Mapping[str, Any]] = {}
    """What sets a variant's configuration apart from the one it is given."""
    weighed: ClassVar[bool] = True
    """Whether C has a part in its least squares."""

    subject: MendEditor

    def __init__(self, subject: MendEditor, *, weight: float | None = None, rounds: int | None = None):
        super().__init__(subject)
        if weight is not None and not weight > 0:
            raise ValueError(f"weight is {weight:g}; it must be greater than 0.")
        if (weight, rounds) != (None, None) and not self.weighs(subject.config):
            raise ValueError(f"C has no part in edits of {self.name} here: there is nothing to weigh; leave it out.")
        self.rounds = None if rounds is None else replace(subject.config, rounds=rounds).rounds
        self.weight = (weight or 1.0) if self.weighs(subject.config) else None

    @classmethod
    def weighs(cls, config: MendConfig) -> bool:
        """Whether C has a part in an edit by an editor of that configuration."""
        return cls.weighed and replace(config, **cls.changes).aggregation == "least_squares"

    @classmethod
    def of(cls, editor: MendEditor, **options: Any) -> Mend:
        """The system of an editor that is there already."""
        return cls(editor, **options)

    @classmethod
    def make(cls, model: nn.Module, tokenizer: Any, config: MendConfig, **options: Any) -> System:
        return cls(MendEditor.from_model(model, tokenizer, replace(config, **cls.changes)), **options)

    def fit(
        self,
        sampler: Sampler,
        config: TrainConfig,
        *,
        output: str | Path | None = None,
        validation: Sampler | None = None,
        progress: bool = True,
    ) -> dict[str, float]:
        trainer = Trainer(self.subject, sampler, config, output=output, validation=validation, progress=progress)
        trainer.resume()
        return trainer.run()

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.subject.parameters())

    def save(self, directory: str | Path) -> None:
        self.subject.save_pretrained(directory)

    def load(self, directory: str | Path) -> None:
        editor = MendEditor.from_pretrained(directory, self.subject.model, self.subject.tokenizer)
        if differing := [name for name, value in self.changes.items() if getattr(editor.config, name) != value]:
            raise ValueError(
                f"{directory} holds no editor for {self.name}: its {', '.join(differing)} differ; "
                "load it as the system that it was trained as."
            )
        self.subject = editor

    def changed_layers(self) -> Sequence[Layer]:
        return self.subject.layers

    def _edited(self, requests: Sequence[EditRequest]) -> contextlib.AbstractContextManager:
        with self._weighing():
            self._edit = self.subject.edit(requests)
        return self._edit.attached(self.subject.model)

    @contextlib.contextmanager
    def _weighing(self) -> Iterator[None]:
        """Within the block C weighs ``weight`` times as much, and rows are weighed in ``rounds``."""
        editor, config = self.subject, self.subject.config
        learned = None if self.weight in (None, 1.0) else editor.log_mu.detach().clone()
        try:
            if self.rounds is not None:
                editor.config = replace(config, rounds=self.rounds)
            if learned is not None:
                with torch.no_grad():
                    editor.log_mu.add_(math.log(self.weight))
            yield
        finally:
            editor.config = config
            if learned is not None:
                with torch.no_grad():
                    editor.log_mu.copy_(learned)

    @torch.no_grad()
    def _weight(self, layer: Layer) -> torch.Tensor:
        u, delta, alpha = self._edit.factors[layer.name]
        change = -alpha * delta.T @ u
        return (layer.weight + (change if layer.layout == "out_in" else change.T)).to(layer.weight.dtype)

    @contextlib.contextmanager
    def _edited_in_turn(self, requests: Sequence[EditRequest]) -> Iterator[None]:
        memory = self._remembered(requests)
        with self._weighing(), memory.attached():
            yield

    def _remembered(self, requests: Sequence[EditRequest]) -> EditMemory:
        memory, turns, done = EditMemory(self.subject), self.turns, 0
        if turns is not None:
            done, _ = turns.resume(requests)
            memory = EditMemory.load(turns.memory, self.subject) if done else memory
        for start in range(done, len(requests), AT_A_TIME):
            memory.add(requests[start : start + AT_A_TIME], progress=False)
            done = min(start + AT_A_TIME, len(requests))
            if turns is not None and turns.due(done, len(requests)):
                memory.save(turns.memory)
                turns.keep(done, {"done": torch.tensor(done)})
        return memory


class MendSum(Mend):
    """The same editor, its simultaneous edits summed (Mitchell et al. 2022, Algorithm 2)."""

    key, name, changes, fitted = "mend_sum", "MEND, summed", {"aggregation": "sum"}, False

    @classmethod
    def of(cls, editor: MendEditor, **options: Any) -> Mend:
        """``editor``'s own networks and step sizes, under the other aggregation."""
        summed = MendEditor(editor.model, editor.tokenizer, replace(editor.config, **cls.changes))
        summed.networks, summed.alpha_multiplier = editor.networks, editor.alpha_multiplier
        return cls(summed.eval(), **options)


class Malmen(Mend):
    """MALMEN (Tan et al., ICLR 2024): least squares under a ridge alone, ``(lambda I + U^T U)^-1 U^T D``.

    Each layer's lambda is learned and starts at 1, as in their released code. It is MEND by least squares whose
    protected inputs are isotropic, their weight mu so small that training can't move it.
    """

    key, name, weighed = "malmen", "MALMEN", False
    changes: ClassVar[Mapping[str, Any]] = {
        "aggregation": "least_squares", "ridge": 1.0, "protection": 1e-30, "longest": None, "rounds": 0,
    }  # fmt: skip

    @classmethod
    def make(cls, model: nn.Module, tokenizer: Any, config: MendConfig, **options: Any) -> System:
        system = super().make(model, tokenizer, replace(config, protect_rank=None), **options)
        editor = system.subject
        editor.protect_with(
            Metric({layer.name: _isotropic(layer.m, editor.device) for layer in editor.layers}, model.config.model_type)
        )
        return system


def _isotropic(m: int, device: torch.device) -> SecondMoment:
    """C = I / m, whose trace is 1, so that lambda tr(C) I = lambda I."""
    numbers = {"m": m, "rank": None, "count": 1, "trace": 1.0, "error": 0.0}
    return SecondMoment.from_state(isotropic(m, device)._asdict(), numbers)


class NoSharing(Mend):
    key, name, changes = "mend_no_sharing", "MEND, no sharing", {"shared": False}


class NoNormalisation(Mend):
    key, name, changes = "mend_no_norm", "MEND, no normalisation", {"normalize": False}


class NoIdentity(Mend):
    key, name, changes = "mend_no_identity", "MEND, no identity initialisation", {"identity_init": False}


class OnlyU(Mend):
    key, name, changes = "mend_only_u", "MEND, only u", {"sides": "u"}


class OnlyDelta(Mend):
    key, name, changes = "mend_only_delta", "MEND, only delta", {"sides": "delta"}


class OnlySmaller(Mend):
    key, name, changes = "mend_only_smaller", "MEND, only the smaller side", {"sides": "smaller"}


class Identity(Mend):
    """The editor at its initialisation: normalised gradients at the initial step size.

    Fitting observes the statistics that it normalises by, and trains nothing.
    """

    key, name, fitted = "identity", "untrained editor", False

    BATCHES = 32
    """Batches of edits that the statistics are taken over, at most."""

    @classmethod
    def of(cls, editor: MendEditor, **options: Any) -> Mend:
        return cls(editor.untrained(), **options)

    @torch.no_grad()
    def fit(
        self,
        sampler: Sampler,
        config: TrainConfig,
        *,
        output: str | Path | None = None,
        validation: Sampler | None = None,
        progress: bool = True,
    ) -> dict[str, float]:
        self.subject = MendEditor.from_model(self.subject.model, self.subject.tokenizer, self.subject.config).train()
        for step in range(min(config.steps, self.BATCHES)):
            inner = sampler.draw(step, config.batch_size).inner
            self.subject.transform(self.subject.gradients(self.subject.tokenize(inner)))
        self.subject.eval()
        return {}

    def parameter_count(self) -> int:
        return 0
