"""Fine-tuning on the edit example: the baselines FT and FT+KL of Mitchell et al. (2022, section 5)."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from .. import ops
from ..capture import frozen
from ..editable import EditableModel
from ..files import atomic_write, read_json_bytes
from ..objective import kept_rows, nll, per_sample_mean, target_rows, to_device
from ..requests import EditRequest
from ..schema import parse_json, shown
from ..training import Sampler, TrainConfig
from .system import System, call, restored

MAX_STEPS = 100


class FineTuning(System):
    """Adam on the matrices that ``subject`` edits, until every target token is the first choice.

    Args:
        subject: see :class:`System`.
        learning_rate: Adam's.
        max_steps: where it gives up.
    """

    key, name = "ft", "FT"

    def __init__(self, subject: EditableModel, learning_rate: float = 1e-3, max_steps: int = MAX_STEPS):
        super().__init__(subject)
        self.learning_rate, self.max_steps = learning_rate, max_steps
        self.steps = 0  # of the last edit

    def fit(
        self,
        sampler: Sampler,
        config: TrainConfig,
        *,
        output: str | Path | None = None,
        validation: Sampler | None = None,
        progress: bool = True,
    ) -> dict[str, float]:
        """There is nothing to train."""
        return {}

    def parameter_count(self) -> int:
        return 0

    def save(self, directory: str | Path) -> None:
        """There is nothing to write."""

    def load(self, directory: str | Path) -> None:
        """There is nothing to read."""

    @contextlib.contextmanager
    def _edited(self, requests: Sequence[EditRequest]) -> Iterator[None]:
        weights = [layer.weight for layer in self.subject.layers]
        with restored(weights) as before:
            self._train(weights, before, requests)
            yield

    def _train(
        self, weights: list[nn.Parameter], before: list[torch.Tensor], requests: Sequence[EditRequest]
    ) -> None:
        model = self.subject.model
        batch = to_device(self.subject.tokenize(requests), self.subject.device)
        optimizer = torch.optim.Adam(weights, lr=self.learning_rate)
        with frozen(model), torch.enable_grad():
            for weight in weights:
                weight.requires_grad_(True)
            for step in range(self.max_steps + 1):
                self.steps = step
                rows = target_rows(model, batch)
                if step == self.max_steps or bool((rows.logits.argmax(-1) == rows.labels).all()):
                    break
                loss = nll(rows, len(requests)).mean() + self._penalty(step, before)
                for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                    weight.grad = gradient
                optimizer.step()
            for weight in weights:
                weight.grad = None
                weight.requires_grad_(False)

    def _penalty(self, step: int, before: list[torch.Tensor]) -> torch.Tensor | float:
        """What is added to the loss, given the step and the unedited weights."""
        return 0.0


class FineTuningKL(FineTuning):
    """Fine-tuning whose loss also holds ``c_loc * KL(p_W || p_W~)`` on inputs of the training data.

    :meth:`fit` keeps a sample of those; each step of an edit takes the next few of them.

    Args:
        subject, learning_rate, max_steps: see :class:`FineTuning`.
        c_loc: weight of the locality term.
        sample_size: inputs to keep.
        batch_size: inputs in each step.
    """

    key, name = "ft_kl", "FT+KL"
    FILE = "locality.json"

    def __init__(
        self,
        subject: EditableModel,
        learning_rate: float = 1e-3,
        max_steps: int = MAX_STEPS,
        *,
        c_loc: float = 1.0,
        sample_size: int = 1024,
        batch_size: int = 16,
    ):
        super().__init__(subject, learning_rate, max_steps)
        self.c_loc, self.sample_size, self.batch_size = c_loc, sample_size, batch_size
        self.sample: list[tuple[str, str]] = []

    def fit(
        self,
        sampler: Sampler,
        config: TrainConfig,
        *,
        output: str | Path | None = None,
        validation: Sampler | None = None,
        progress: bool = True,
    ) -> dict[str, float]:
        """Draw the sample of locality inputs; nothing is trained."""
        draws = -(-self.sample_size // max(1, sampler.loc * config.batch_size))
        drawn = (pair for step in range(draws) for pair in sampler.draw(step, config.batch_size).loc)
        self.sample = list(dict.fromkeys(drawn))[: self.sample_size]
        random.Random(config.seed).shuffle(self.sample)
        return {}

    def save(self, directory: str | Path) -> None:
        atomic_write(Path(directory) / self.FILE, json.dumps(self.sample).encode())

    def load(self, directory: str | Path) -> None:
        path = Path(directory) / self.FILE
        if not path.is_file():
            raise FileNotFoundError(f"{directory} holds no {self.FILE}: no {self.name} was saved there.")
        pairs = parse_json(read_json_bytes(path), str(path))
        if not isinstance(pairs, list) or not all(
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in pairs
        ):
            raise ValueError(f"{path} holds {shown(pairs)}; it must be a list of pairs [prompt, answer].")
        self.sample = [tuple(pair) for pair in pairs]

    def _penalty(self, step: int, before: list[torch.Tensor]) -> torch.Tensor:
        if not self.sample:
            raise ValueError(f"{self.name} has no locality inputs: call fit with a sampler, or load, first.")
        start = step * self.batch_size
        pairs = [self.sample[i % len(self.sample)] for i in range(start, start + self.batch_size)]
        batch = to_device(self.subject.tokenize(pairs), self.subject.device)
        names = [layer.name for layer in self.subject.layers]
        with torch.no_grad():
            base = call(self.subject.model, dict(zip(names, before, strict=True)), kept_rows, batch)
        rows = kept_rows(self.subject.model, batch)
        return self.c_loc * per_sample_mean(
            ops.kl_divergence_rows(base.logits, rows.logits), rows.sample, len(pairs)
        ).mean()
