"""Systems with a network to train, and the loop that trains it: Adam, checkpoints, exact resume.

MEND has :class:`mendfast.training.Trainer`. What differs here is that a step's loss may come in parts, each
backpropagated before the next is computed: the second-order graph of one edit is held at a time.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from ..capture import Factors
from ..editor import MendEditor
from ..files import read_tensors, write_tensors
from ..objective import Batch
from ..schema import brief, check_dtypes, check_real, shown
from ..training import FactSampler, TrainConfig, TrainingError, checkpoint, meta_loss
from ..training.data import Draw
from ..training.loop import CHECKPOINT, MAX_SKIPPED_IN_A_ROW
from ..training.record import Record
from ..training.report import read_metrics, write_report
from .system import System

START_EDITS = 16  # that a system sees before its first step, to start from
GRADIENT_STEPS = [10 ** (i / 2) for i in range(-6, 7)]
STARTING_KL = 0.1  # nats

LossPart = tuple[torch.Tensor, dict[str, torch.Tensor]]


class Fitted(System):
    """A system that trains the parameters of ``network`` that ask for a gradient."""

    network: nn.Module
    FILE = "system.safetensors"

    @abstractmethod
    def losses(self, draw: Draw, config: TrainConfig, joint: int) -> Iterator[LossPart]:
        """Scalars whose sum is the loss of one step, each with its metrics (of which the mean is reported).

        A function of the network and ``draw`` alone, so that a resumed run goes on as if never interrupted.
        """

    def start(self, draw: Draw, config: TrainConfig) -> None:
        """Called once before the first step, with edits to start from; see :func:`best_gradient_step`."""

    def parameter_groups(self, config: TrainConfig) -> list[dict]:
        """What Adam takes: parameters and their learning rates."""
        return [{"params": list(self.trained().values()), "lr": config.learning_rate}]

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    def fit(
        self,
        sampler: FactSampler,
        config: TrainConfig,
        *,
        output: str | Path | None = None,
        validation: FactSampler | None = None,
        progress: bool = True,
    ) -> dict[str, float]:
        """Train for ``config.steps``; see :meth:`System.fit`.

        Writes ``last/`` and, by the validation loss, ``best/`` (what :meth:`load` reads), ``metrics.jsonl``,
        and at the end ``curves.png`` and ``report.html``.
        """
        return _Run(self, sampler, config, Path(output) if output else None, validation, progress).run()

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


class _GradientStep:
    """Steps of one rate along known gradients in the shape of an editor, for :func:`mendfast.training.meta_loss`."""

    def __init__(self, subject: MendEditor, gradients: Mapping[str, tuple[torch.Tensor, torch.Tensor]], rate: float):
        self.model, self.layers, self.config = subject.model, subject.layers, subject.config
        self.factors = {name: (u, delta, rate) for name, (u, delta) in gradients.items()}

    def group_factors(self, batch: Batch, group_size: int = 1) -> dict[str, Factors]:
        return self.factors


def best_gradient_step(subject: MendEditor, draw: Draw, config: TrainConfig) -> float:
    """The rate, of 13 from 1e-3 to 1e3, at which a plain gradient step has the least training loss on ``draw``,
    of those that leave other answers nearly alone (a divergence of at most :data:`STARTING_KL`).

    The gradient's size differs between models by orders of magnitude, so that no one rate would serve them all. Where
    all edits flip every answer the loss may be low too, as with claims, but training hardly leaves that state.
    """
    batches = [subject.tokenize(pairs) for pairs in draw]
    gradients, losses = subject.gradients(batches[0]), {}
    for rate in GRADIENT_STEPS:
        with torch.no_grad():
            loss, parts = meta_loss(_GradientStep(subject, gradients, rate), *batches, config.c_edit, config.c_loc)
        if parts["l_loc"] <= STARTING_KL:
            losses[rate] = loss.item()
    return min(losses, key=losses.get, default=GRADIENT_STEPS[0])


class _Run:
    """One run of :meth:`Fitted.fit`."""

    def __init__(
        self,
        system: Fitted,
        sampler: FactSampler,
        config: TrainConfig,
        output: Path | None,
        validation: FactSampler | None,
        progress: bool,
    ):
        self.system, self.sampler, self.config, self.output = system, sampler, config, output
        self.validation, self.progress = validation, progress
        self.step, self.skipped, self.best, self.stale = 0, 0, math.inf, 0
        self._record = Record(output)
        self.optimizer = torch.optim.Adam(system.parameter_groups(config))
        self._rates = [group["lr"] for group in self.optimizer.param_groups]

    def run(self) -> dict[str, float]:
        if not self._resume():
            self.system.start(self.sampler.draw(0, START_EDITS), self.config)
        self._record.open(self.step)
        config, in_a_row, validated, metrics = self.config, 0, {}, {}
        bar = tqdm(
            total=config.steps, initial=self.step, desc=self.system.name, unit="step", disable=not self.progress
        )
        while self.step < config.steps and not self._stale():
            metrics = self._train_step()
            in_a_row = 0 if math.isfinite(metrics["gradient_norm"]) else in_a_row + 1
            if in_a_row == MAX_SKIPPED_IN_A_ROW:
                raise TrainingError(
                    f"{self.system.name}: {in_a_row} steps in a row had a loss or gradient that is not finite; stopped "
                    f"at step {self.step}. Lower the learning rates, or load the base model in float32."
                )
            if config.validate_every and (self.step % config.validate_every == 0 or self.step == config.steps):
                validated = self._validate()
                metrics |= validated
            bar.set_postfix(
                loss=f"{metrics['loss']:.3f}",
                ES=f"{metrics['edit_success']:.2f}",
                **({"val": f"{validated['val_loss']:.3f}"} if validated else {}),
                **({"skipped": self.skipped} if self.skipped else {}),
            )
            bar.update()
            self._record.add(metrics)
            if self.step % config.checkpoint_every == 0 or self.step == config.steps or self._stale():
                self._save()
        bar.close()
        if self.output:
            self.system.save(self.output / "last")
            write_report(self.output)
        return metrics or read_metrics(self.output)[-1]

    def _stale(self) -> bool:
        return 0 < self.config.patience <= self.stale

    def _train_step(self) -> dict[str, float]:
        config = self.config
        joint = config.joint_size(self.step)
        draw = self.sampler.draw(self.step, config.groups(joint) * joint)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * config.rate(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        means = self._means(draw, joint, backward=True)
        norm = float(nn.utils.clip_grad_norm_(self.system.trained().values(), config.clip))
        if math.isfinite(norm + means["loss"]):
            self.optimizer.step()
        else:
            norm, self.skipped = math.nan, self.skipped + 1
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {"step": self.step, "joint": joint, "gradient_norm": norm, **means}

    def _means(self, draw: Draw, joint: int, backward: bool = False) -> dict[str, float]:
        loss, parts, count = 0.0, Counter(), 0
        for part, metrics in self.system.losses(draw, self.config, joint):
            if backward:
                part.backward()
            loss, count = loss + part.item(), count + 1
            parts.update({name: value.item() for name, value in metrics.items()})
        return {"loss": loss, **{name: value / count for name, value in parts.items()}}

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        if self.validation is None:
            return {}
        size = min(32, self.config.validation_size)
        rounds = -(-self.config.validation_size // size)
        totals = Counter()
        for i in range(rounds):
            totals.update(self._means(self.validation.draw(-1 - i, size), joint=1))
        means = {f"val_{name}": value / rounds for name, value in totals.items()}
        if means["val_loss"] < self.best:
            self.best, self.stale = means["val_loss"], 0
            if self.output:
                self.system.save(self.output / "best")
        else:
            self.stale += 1
        return means

    # -- files ---------------------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.output:
            progress = {"step": self.step, "skipped": self.skipped, "best": self.best, "stale": self.stale}
            parameters, path = self.system.trained(), self.output / "last" / CHECKPOINT
            checkpoint.write(path, parameters, self.optimizer, self.config, progress, system=self.system.key)

    def _resume(self) -> bool:
        path = self.output / "last" / CHECKPOINT if self.output else None
        if path is None or not path.is_file():
            return False
        parameters, progress = checkpoint.read(path, self.optimizer, self.config, system=self.system.key)
        self.system.load_tensors(parameters, str(path))
        self.step, self.skipped = progress["step"], progress["skipped"]
        self.best, self.stale = progress["best"], progress["stale"]
        return True
