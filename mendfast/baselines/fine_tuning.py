"""Fine-tuning on the edits: FT and FT+KL of Mitchell et al. (2022, section 5), one layer, and breadth first."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from .. import ops
from ..capture import frozen
from ..editable import EditableModel
from ..files import atomic_write, read_json_bytes
from ..frozen_prefix import FrozenPrefix
from ..layers import Layer
from ..objective import kept_rows, nll, per_sample_mean, target_rows, to_device
from ..requests import EditRequest
from ..schema import parse_json, shown
from ..training import Sampler, TrainConfig
from ..training.cache import PrefixCache
from .system import Untrained, call, restored
from .turns import numbered, take

MAX_STEPS = 100
STATES = 1 << 29
"""Bytes for what the blocks below the trained ones give for each edit."""


class FineTuning(Untrained):
    """Adam on the matrices that ``subject`` edits, until every target token is the first choice.

    Args:
        subject: see :class:`System`.
        learning_rate: Adam's.
        max_steps: where it gives up.
    """

    key, name, of_parameters = "ft", "FT", True

    def __init__(self, subject: EditableModel, learning_rate: float = 1e-3, max_steps: int = MAX_STEPS):
        super().__init__(subject)
        self.learning_rate, self.max_steps = learning_rate, max_steps
        self.steps = 0  # of the last edit

    @property
    def layers(self) -> list[Layer]:
        """Those that are trained."""
        return self.subject.layers

    def changed_layers(self) -> Sequence[Layer]:
        return self.layers

    def _edited(self, requests: Sequence[EditRequest]) -> contextlib.AbstractContextManager:
        return self._trained([requests])

    def _edited_in_turn(self, requests: Sequence[EditRequest]) -> contextlib.AbstractContextManager:
        return self._trained([[request] for request in requests])

    @contextlib.contextmanager
    def _trained(self, groups: Sequence[Sequence[EditRequest]]) -> Iterator[None]:
        """Trained on one group of requests after the other."""
        weights = [layer.weight for layer in self.layers]
        with restored(weights) as before:
            self._one_by_one(weights, before, groups)
            yield

    def _one_by_one(
        self, weights: list[nn.Parameter], before: list[torch.Tensor], groups: Sequence[Sequence[EditRequest]]
    ) -> None:
        turns, done = self.turns if len(groups) > 1 else None, 0
        if turns is not None:
            done, state = turns.resume([request for requests in groups for request in requests])
            if done:
                take(weights, state)
        for i in range(done, len(groups)):
            self._train(weights, before, groups[i])
            if turns is not None and turns.due(i + 1, len(groups)):
                turns.keep(i + 1, numbered(weights))

    def _train(self, weights: list[nn.Parameter], before: list[torch.Tensor], requests: Sequence[EditRequest]) -> None:
        model = self.subject.model
        batch = to_device(self.subject.tokenize(requests), self.subject.device)
        with trainable(model, weights), torch.enable_grad():
            optimizer = torch.optim.Adam(weights, lr=self.learning_rate)
            below = FrozenPrefix(model, self.layers)
            for step in range(self.max_steps + 1):
                self.steps = step
                with below.kept():
                    rows = target_rows(model, batch)
                if step == self.max_steps or bool((rows.logits.argmax(-1) == rows.labels).all()):
                    break
                descend(optimizer, nll(rows, len(requests)).mean() + self._penalty(step, before))

    def _penalty(self, step: int, before: list[torch.Tensor]) -> torch.Tensor | float:
        """What is added to the loss, given the step and the unedited weights."""
        return 0.0


class FineTuningOneLayer(FineTuning):
    """Fine-tuning of one matrix alone.

    Args:
        subject, learning_rate, max_steps: see :class:`FineTuning`.
        layer: which of ``subject.layers``, counted from 0, or from the last, -1.
    """

    key, name = "ft_one_layer", "FT, one layer"

    def __init__(
        self, subject: EditableModel, learning_rate: float = 1e-3, max_steps: int = MAX_STEPS, *, layer: int = -1
    ):
        super().__init__(subject, learning_rate, max_steps)
        _check_layer(subject, layer)
        self.layer = layer

    @property
    def layers(self) -> list[Layer]:
        return [self.subject.layers[self.layer]]


def _check_layer(subject: EditableModel, layer: int) -> None:
    count = len(subject.layers)
    if not -count <= layer < count:
        raise ValueError(f"layer is {layer}, and there are {count} layers; pass {-count} to {count - 1}.")


class FineTuningBreadthFirst(FineTuning):
    """LocFT-BF (Yang et al. 2025, arXiv:2509.22072): epochs over all edits, and not one edit after the other.

    Each epoch shuffles the edits into batches and takes a step of Adam on each whose loss is not below ``enough``;
    it ends with the first epoch whose mean loss is. One matrix is trained, and targets end in the end token.

    Args:
        subject: see :class:`System`.
        learning_rate: Adam's.
        epochs: at most.
        batch_size: edits in a batch.
        enough: of the loss.
        layer: see :class:`FineTuningOneLayer`.
        seed: of the order.
    """

    key, name = "ft_breadth_first", "FT, breadth first"

    def __init__(
        self,
        subject: EditableModel,
        learning_rate: float = 5e-4,
        *,
        epochs: int = 25,
        batch_size: int = 100,
        enough: float = 1e-2,
        layer: int = -1,
        seed: int = 0,
    ):
        super().__init__(subject, learning_rate, epochs)
        _check_layer(subject, layer)
        self.epochs, self.batch_size, self.enough, self.layer, self.seed = epochs, batch_size, enough, layer, seed
        ends = subject.kind == "causal" and getattr(subject.tokenizer, "eos_token_id", None) is not None
        # what is asked afterwards goes on as before, so that the figures are those of the same questions
        taught = replace(subject.config, append_eos=ends or subject.config.append_eos)
        self._taught = EditableModel(subject.model, subject.tokenizer, taught)

    @property
    def layers(self) -> list[Layer]:
        return [self.subject.layers[self.layer]]

    def _edited_in_turn(self, requests: Sequence[EditRequest]) -> contextlib.AbstractContextManager:
        return self._edited(requests)

    def _train(self, weights: list[nn.Parameter], before: list[torch.Tensor], requests: Sequence[EditRequest]) -> None:
        model, rng, order = self.subject.model, random.Random(self.seed), list(requests)
        with trainable(model, weights), torch.enable_grad():
            optimizer = torch.optim.Adam(weights, lr=self.learning_rate)
            below = PrefixCache(model, self.layers, STATES)
            done = self._resume(weights, optimizer, requests)
            for epoch in range(self.epochs):
                self.steps, total = epoch + 1, 0.0
                rng.shuffle(order)
                if epoch < done:
                    continue
                for start in range(0, len(order), self.batch_size):
                    chosen = order[start : start + self.batch_size]
                    batch = to_device(self._taught.tokenize(chosen), self.subject.device)
                    with below.replayed(batch):
                        loss = nll(target_rows(model, batch), len(chosen)).mean()
                    total += loss.item() * len(chosen)
                    if loss.item() >= self.enough:
                        descend(optimizer, loss)
                if total < self.enough * len(order):
                    break
                if self.turns is not None and self.turns.due(epoch + 1, self.epochs):
                    moments = _moments(weights, optimizer) | {"epochs": torch.tensor(epoch + 1)}
                    self.turns.keep(1, numbered(weights) | moments)

    def _resume(
        self, weights: list[nn.Parameter], optimizer: torch.optim.Optimizer, requests: Sequence[EditRequest]
    ) -> int:
        """Take over what a sequence that was cut off had come to; how many epochs that were."""
        state = self.turns.resume(requests)[1] if self.turns is not None else {}
        if not state:
            return 0
        take(weights, state)
        for i, weight in enumerate(weights):
            names = [name for name in state if name.startswith(f"adam.{i}.")]
            optimizer.state[weight] = {name.split(".")[2]: state[name].clone() for name in names}
        return int(state["epochs"])


def _moments(weights: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Adam's, numbered as the weights are."""
    found = enumerate(optimizer.state.get(weight, {}) for weight in weights)
    return {f"adam.{i}.{name}": part for i, state in found for name, part in state.items()}


@contextlib.contextmanager
def trainable(model: nn.Module, weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within the block these weights of the model, and no others, ask for gradients; afterwards they have none."""
    with frozen(model):
        try:
            for weight in weights:
                weight.requires_grad_(True)
            yield
        finally:
            for weight in weights:
                weight.grad = None
                weight.requires_grad_(False)


def descend(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """One step of the optimizer, on its own parameters alone."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
        weight.grad = gradient
    optimizer.step()


class FineTuningKL(FineTuning):
    """Fine-tuning whose loss also holds ``c_loc * KL(p_W || p_W~)`` on inputs of the training data.

    :meth:`fit` keeps a sample of those; each step of an edit takes the next few of them.

    Args:
        subject, learning_rate, max_steps: see :class:`FineTuning`.
        c_loc: weight of the locality term.
        sample_size: inputs to keep.
        batch_size: inputs in each step.
    """

    key, name, fitted = "ft_kl", "FT+KL", True
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
        return (
            self.c_loc
            * per_sample_mean(ops.kl_divergence_rows(base.logits, rows.logits), rows.sample, len(pairs)).mean()
        )
