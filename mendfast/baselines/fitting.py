"""Systems that train a network of their own, and the gradient step that they start from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from ..editable import EditableModel
from ..files import read_tensors, write_tensors
from ..schema import brief, check_dtypes, check_real, shown
from ..training import Learner, Sampler, TrainConfig, Trainer, meta_loss
from ..training.data import Draw
from ..training.learner import STARTING_KL
from .system import System

GRADIENT_STEPS = [10 ** (i / 2) for i in range(-6, 7)]


class Fitted(System, Learner):
    """A system that is its own learner: it trains the parameters of ``network`` that ask for a gradient."""

    network: nn.Module
    FILE = "system.safetensors"

    def parameter_groups(self, config: TrainConfig) -> list[dict]:
        """What Adam takes: parameters and their learning rates."""
        return [{"params": list(self.trained().values()), "lr": config.learning_rate}]

    def state(self) -> dict[str, torch.Tensor]:
        return self.trained()

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    def fit(
        self,
        sampler: Sampler,
        config: TrainConfig,
        *,
        output: str | Path | None = None,
        validation: Sampler | None = None,
        progress: bool = True,
    ) -> dict[str, float]:
        """Train for ``config.steps``; see :meth:`System.fit`.

        Writes ``last/`` and, by the validation loss, ``best/`` (what :meth:`load` reads), ``metrics.jsonl``,
        and at the end ``curves.png`` and ``report.html``.
        """
        trainer = Trainer(self, sampler, config, output=output, validation=validation, progress=progress)
        trainer.resume()
        return trainer.run()

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.trained().values())

    def save(self, directory: str | Path) -> None:
        metadata = {
            "format": "mendfast.system",
            "system": self.key,
            "model_type": self.subject.model.config.model_type,
        }
        write_tensors(Path(directory) / self.FILE, self.trained(), metadata)

    def load(self, directory: str | Path) -> None:
        tensors, metadata = read_tensors(Path(directory) / self.FILE, "system")
        kind = self.subject.model.config.model_type
        if (metadata.get("system"), metadata.get("model_type")) != (self.key, kind):
            found, made_for = shown(metadata.get("system")), brief(metadata.get("model_type"), 40)
            raise ValueError(
                f"{directory} holds {found} for a {made_for} model; "
                f"this is {self.key!r} for a {kind}."
            )
        self.load_tensors(tensors, str(directory))

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, torch.Tensor], source: str) -> None:
        own = self.trained()
        wrong = [name for name in own if name not in tensors or tensors[name].shape != own[name].shape]
        if wrong := wrong + [name for name in tensors if name not in own]:
            raise ValueError(f"{source} was made for another model or other settings: {', '.join(wrong[:3])} differ.")
        check_dtypes(tensors, own, source)
        for name, parameter in own.items():
            parameter.copy_(check_real(tensors[name], f"{source}: {name}"))


def best_gradient_step(subject: EditableModel, draw: Draw, config: TrainConfig) -> float:
    """The rate, of 13 from 1e-3 to 1e3, at which a plain gradient step has the least training loss on ``draw``,
    of those that leave other answers nearly alone (:data:`mendfast.training.learner.STARTING_KL`).

    The gradient's size differs between models by orders of magnitude, so that no one rate would serve them all.
    """
    inner, outer, loc = (subject.tokenize(pairs) for pairs in draw)
    gradients, losses = subject.gradients(inner), {}
    for rate in GRADIENT_STEPS:
        factors = {name: (u, delta, rate) for name, (u, delta) in gradients.items()}
        with torch.no_grad():
            loss, parts = meta_loss(subject, factors, outer, loc, config.c_edit, config.c_loc)
        if parts["l_loc"] <= STARTING_KL:
            losses[rate] = loss.item()
    return min(losses, key=losses.get, default=GRADIENT_STEPS[0])
