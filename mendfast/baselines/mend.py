"""MEND itself, its ablations (Mitchell et al. 2022, section 5), and the editor that was never trained."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ..config import MendConfig
from ..editor import MendEditor
from ..requests import EditRequest
from ..training import Sampler, TrainConfig, Trainer
from .system import System


class Mend(System):
    """MEND: ``subject`` is the editor."""

    key, name = "mend", "MEND"
    changes: ClassVar[Mapping[str, Any]] = {}
    """What sets a variant's configuration apart from the one it is given."""

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

    def _edited(self, requests: Sequence[EditRequest]) -> contextlib.AbstractContextManager:
        return self.subject.edit(requests).attached(self.subject.model)


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

    key, name = "identity", "untrained editor"

    BATCHES = 32
    """Batches of edits that the statistics are taken over, at most."""

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
