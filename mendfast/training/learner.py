"""What the loop trains: anything that turns the draws of a step into losses, and can be written and read."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..editable import EditableModel
from ..editor import MendEditor
from ..fingerprint import fingerprint_of
from ..labels import encode_prompt
from ..objective import Batch
from .cache import PrefixCache
from .config import TrainConfig
from .data import Draw, digest
from .memory import predict, predict_cache
from .meta import editor_loss
from .prefill import prefill

STEP_SIZE = "config.step_size"
HOW_READ = ("layers", "loss_reduction", "chat", "prompt_template", "separator", "append_eos")
A_QUESTION = "What is the capital of France?"
STEP_SIZES = [10 ** (i / 2) for i in range(-12, 1)]
STARTING_KL = 0.1
"""Nats that other answers may move by where a training starts. Where all edits flip every answer the loss may be low
too, as with claims, but training hardly leaves that state."""

log = logging.getLogger("mendfast")

LossPart = tuple[torch.Tensor, dict[str, torch.Tensor]]


def base_model_digest(subject: EditableModel) -> str:
    """A short name for the base model's weights, of which some hundred numbers are read."""
    found = fingerprint_of(subject.model, subject.layers)
    return digest([f"{name} {sample.values.tolist()}" for name, sample in sorted(found.samples.items())])


class Learner(ABC):
    """Parameters that :class:`~mendfast.training.Trainer` can train.

    A step's loss may come in parts, each backpropagated before the next is computed, so that one part's graph is held
    at a time.
    """

    key: str
    """What its checkpoints are known by."""
    name: str
    """What the progress bar says."""
    subject: EditableModel

    @abstractmethod
    def parameter_groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        """What Adam takes: parameters and their learning rates."""

    @abstractmethod
    def losses(self, draw: Draw, config: TrainConfig, joint: int) -> Iterator[LossPart]:
        """Scalars whose sum is the loss of ``draw``, each with its metrics (of which the mean is reported).

        A function of the learner's state and ``draw`` alone, so that a resumed run goes on as if never interrupted.
        """

    @abstractmethod
    def state(self) -> dict[str, torch.Tensor]:
        """The tensors that training moves, by name: parameters, and statistics where there are any."""

    @abstractmethod
    def load_tensors(self, tensors: Mapping[str, torch.Tensor], source: str) -> None:
        """Take over what :meth:`state` gave; a ValueError that names ``source`` if it does not fit."""

    @abstractmethod
    def save(self, directory: str | Path) -> None:
        """Write what is needed for use, as safetensors and JSON."""

    # What a learner may leave as it is.
    def settings(self) -> dict[str, Any]:
        """What makes its training what it is, beside the configuration of the loop, as JSON takes it: a run goes on
        from a checkpoint only with the same. Here how text becomes tokens, the layers and the base model's weights."""
        subject = self.subject
        # of chat template and vocabulary the configuration does not speak
        text = subject.prompt_text(A_QUESTION) if subject.tokenizer is not None else ""
        return {
            **{name: getattr(subject.config, name) for name in HOW_READ},
            "tokens of a question": encode_prompt(subject.tokenizer, text) if text else [],
            "base model": base_model_digest(subject),
        }

    def finite(self) -> bool:
        """Whether :meth:`state` may be written: it holds neither NaN nor infinity."""
        return all(bool(tensor.isfinite().all()) for tensor in self.state().values())

    def start(self, draw: Draw, config: TrainConfig) -> None:  # noqa: B027
        """Called once before the first step of a run that is not resumed, with edits to start from."""

    def train(self, mode: bool = True) -> None:  # noqa: B027
        """Whether passes move statistics."""

    def open_cache(self, config: TrainConfig, directory: Path | None = None) -> None:  # noqa: B027
        """Called at the start of each run: the base model stays as it is from here to the run's end.

        ``directory``: where a cache may write; None without ``config.cache_disk_bytes``.
        """

    def prefill(self, draws: Iterable[Draw], config: TrainConfig, progress: bool | None) -> None:  # noqa: B027
        """Called with ``config.prefill`` before the first step of each run, with the draws that it will ask for."""

    def flush_cache(self) -> None:  # noqa: B027
        """Called when a run has ended: what the next one can use goes to disk."""

    def summary(self) -> str:
        """What there is to say of a run that has ended, in a sentence; may be empty."""
        return ""

    def gather_with(self, gather: Any) -> None:  # noqa: B027
        """Of several processes: how statistics of one become those of all; None when training is over."""

    def plan(self, draw: Draw, config: TrainConfig, joint: int) -> dict[str, int]:
        """The bytes, by kind, that training on ``draw`` holds at most; see :func:`mendfast.training.memory.predict`."""
        raise TypeError(f"The memory of {self.name} is not predicted; that of MEND's editors is.")

    def plan_cache(self, draws: Iterable[Draw], steps: int, config: TrainConfig) -> dict[str, int]:
        """The bytes that a cache will hold, as :func:`mendfast.training.memory.predict_cache`; {} without one."""
        return {}

    def parameters(self, config: TrainConfig) -> list[nn.Parameter]:
        return [parameter for group in self.parameter_groups(config) for parameter in group["params"]]


class EditorLearner(Learner):
    """MEND: an editor as the loop trains it."""

    key, name = "mend", "meta-training"

    def __init__(self, editor: MendEditor):
        self.subject = self.editor = editor
        self.cache: PrefixCache | None = None
        self._first_step_size = editor.config.step_size  # a calibration finds another

    def parameter_groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        scales = self.editor.scales()
        chosen = set(map(id, scales))
        networks = [parameter for parameter in self.editor.parameters() if id(parameter) not in chosen]
        return [
            {"params": networks, "lr": config.learning_rate},
            {"params": scales, "lr": config.alpha_learning_rate},
        ]

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), **asdict(self.editor.config), "step_size": self._first_step_size}

    def finite(self) -> bool:
        if self.editor.config.normalize:
            return super().finite()
        return all(bool(parameter.isfinite().all()) for parameter in self.editor.parameters())

    def losses(self, draw: Draw, config: TrainConfig, joint: int) -> Iterator[LossPart]:
        batches = self._tokenized(draw)
        yield editor_loss(
            self.editor,
            *batches,
            config.c_edit,
            config.locality_weight(joint),
            joint=joint * len(self.editor.forms),
            checkpoint_activations=config.checkpoint_activations,
            # Validations compare all positions. The draw stands for the step, as it depends on that alone.
            loc_answers=config.loc_answers,
            loc_root=config.loc_root,
            loc_positions=config.loc_positions if self.editor.training else 0,
            seed=f"{config.seed}:{draw}" if config.loc_positions else 0,
            cache=self.cache,
            precision=config.precision,
        )

    def _tokenized(self, draw: Draw) -> list[Batch]:
        inner, *others = draw
        return [self.editor.tokenize_edits(inner), *map(self.editor.tokenize, others)]

    @torch.no_grad()
    def start(self, draw: Draw, config: TrainConfig) -> None:
        """Statistics of a first draw, and with ``config.calibrate`` the step size to start from."""
        if not config.calibrate:
            return
        self.editor.train()
        self.editor.transform(self.editor.gradients(self.editor.tokenize_edits(draw.inner)))
        self.editor.eval()
        # a classifier's flipped answers cost little; a language model that says the target everywhere pays for it
        bounded = self.subject.kind == "classifier"
        most = ((STARTING_KL / 2) ** 0.5 if config.loc_root else STARTING_KL) if bounded else math.inf
        losses: dict[float, float] = {}
        for size in STEP_SIZES:
            self.editor.config.step_size = size
            totals, parts = zip(*self.losses(draw, config, 1), strict=True)
            loss, moved = sum(map(float, totals)), sum(float(part["l_loc"]) for part in parts) / len(parts)
            if math.isfinite(loss) and moved <= most:
                losses[size] = loss
        self.editor.config.step_size = min(losses, key=losses.get, default=STEP_SIZES[0])
        log.info("step size %g: of %s", self.editor.config.step_size, {k: round(v, 3) for k, v in losses.items()})

    def open_cache(self, config: TrainConfig, directory: Path | None = None) -> None:
        self.cache = None
        if config.cache_bytes:
            disk = {"directory": directory, "disk_limit": config.cache_disk_bytes}
            self.cache = PrefixCache(self.editor.model, self.editor.layers, config.cache_bytes, **disk)

    def prefill(self, draws: Iterable[Draw], config: TrainConfig, progress: bool | None) -> None:
        if self.cache is None:
            return
        final = config.precision != "bfloat16"
        batches = (pair for draw in draws for pair in zip(self._tokenized(draw), (False, False, final), strict=True))
        prefill(self.cache, batches, progress=progress)

    def flush_cache(self) -> None:
        if self.cache is not None:
            self.cache.flush()

    def summary(self) -> str:
        return self.cache.summary() if self.cache is not None else ""

    def state(self) -> dict[str, torch.Tensor]:
        size = torch.tensor(self.editor.config.step_size, dtype=torch.float64, device=self.editor.device)
        return {**self.editor.state_dict(), STEP_SIZE: size}

    def load_tensors(self, tensors: Mapping[str, torch.Tensor], source: str) -> None:
        tensors = dict(tensors)
        size = tensors.pop(STEP_SIZE, None)
        self.editor.load_tensors(tensors, source)
        if size is not None:
            self.editor.config = replace(self.editor.config, step_size=size.item())

    def save(self, directory: str | Path) -> None:
        self.editor.save_pretrained(directory)

    def train(self, mode: bool = True) -> None:
        self.editor.train(mode)

    def gather_with(self, gather: Any) -> None:
        self.editor.gather = gather

    def plan(self, draw: Draw, config: TrainConfig, joint: int) -> dict[str, int]:
        batches = tuple(self._tokenized(draw))
        recompute = config.checkpoint_activations
        return predict(self.editor, batches, joint=joint * len(self.editor.forms), checkpoint_activations=recompute)

    def plan_cache(self, draws: Iterable[Draw], steps: int, config: TrainConfig) -> dict[str, int]:
        return predict_cache(self.editor, draws, steps, config) if config.cache_bytes else {}
