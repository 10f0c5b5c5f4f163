"""One interface for every way to edit a model: fit once, then edit, ask, and have the old model back."""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ..config import MendConfig
from ..editable import EditableModel
from ..experts import parsed
from ..generation import answer
from ..layers import Layer
from ..objective import Batch, Rows
from ..requests import EditRequest
from ..training import Sampler, TrainConfig
from ..variants import Weights, held_apart
from .turns import Turns


class System(ABC):
    """A way to make a model answer a prompt with a target.

    Args:
        subject: the model that is edited and asked, its tokenisation and the matrices that an edit may
            change. MEND and its variants take an editor.
    """

    key: ClassVar[str]
    """What it is asked for by, as in :data:`mendfast.baselines.SYSTEMS`."""
    name: ClassVar[str]
    """What tables print."""
    fitted: ClassVar[bool] = True
    """Whether it is of use only after :meth:`fit`, and so needs data to train on."""

    of_parameters: ClassVar[bool] = False
    """Whether it needs each matrix to be a parameter of its own, which one of a stack of experts isn't."""

    def __init__(self, subject: EditableModel):
        if self.of_parameters and (stacked := [layer.name for layer in subject.layers if parsed(layer.name)]):
            raise ValueError(
                f"{self.name} trains parameters, and {stacked[0]} is a part of one; name other layers, or use mend."
            )
        self.subject = subject
        self.seconds = 0.0  # of the last edit
        self.turns: Turns | None = None  # where a sequence of edits is kept, to go on from
        self.subjects: dict[str, str] = {}  # of prompts, where the data names them; what each edit is about

    @classmethod
    def make(cls, model: nn.Module, tokenizer: Any, config: MendConfig, **options: Any) -> System:
        """A new system for ``model``."""
        return cls(EditableModel(model, tokenizer, config), **options)

    # -- once ----------------------------------------------------------------------------------------------

    @abstractmethod
    def fit(
        self,
        sampler: Sampler,
        config: TrainConfig,
        *,
        output: str | Path | None = None,
        validation: Sampler | None = None,
        progress: bool = True,
    ) -> dict[str, float]:
        """Train what there is to train on what ``sampler`` draws; returns the last metrics.

        With ``output`` checkpoints are written there, and a run that was cut off goes on from the last one.
        """

    @abstractmethod
    def parameter_count(self) -> int:
        """How many numbers :meth:`fit` trains."""

    @abstractmethod
    def save(self, directory: str | Path) -> None:
        """Write what :meth:`fit` made, as safetensors and JSON."""

    @abstractmethod
    def load(self, directory: str | Path) -> None:
        """Take over what :meth:`save` wrote for a system of this kind and a model of the same shape."""

    def changed_layers(self) -> Sequence[Layer] | None:
        """The layers below which an edit leaves all as it was; None where it changes more than layers' weights."""
        return None

    def prepare(self) -> None:  # noqa: B027
        """Make, before the first edit, what all edits need; its time is no edit's."""

    def remembering(self) -> contextlib.AbstractContextManager:
        """Within the block, in which the model stays as it is but for edits, what edits of the same requests have in
        common under other rates may be kept."""
        return contextlib.nullcontext()

    # -- for each edit -------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def edit(self, requests: Sequence[tuple[str, str]], *, in_turn: bool = False) -> Iterator[nn.Module]:
        """Within the block ``subject.model`` is edited by all ``requests``; afterwards it has its old bits.

        Args:
            in_turn: one after the other, as they come over time, and not all at once.

        Raises:
            ValueError: no requests, or one that cannot be tokenised; see :meth:`mendfast.MendEditor.edit`.
        """
        requests = [EditRequest(*request) for request in requests]
        if not requests:
            raise ValueError("edit was given no requests; pass at least one (prompt, target).")
        self.prepare()
        with contextlib.ExitStack() as stack:
            started = self._clock()
            stack.enter_context((self._edited_in_turn if in_turn else self._edited)(requests))
            self.seconds = self._clock() - started + (self.turns.seconds if in_turn and self.turns else 0.0)
            yield self.subject.model

    @abstractmethod
    def _edited(self, requests: Sequence[EditRequest]) -> contextlib.AbstractContextManager:
        """Edits on entering, and undoes it on leaving."""

    def _edited_in_turn(self, requests: Sequence[EditRequest]) -> contextlib.AbstractContextManager:
        """The same for edits that come one after the other; by default what they make together, of a system that is
        meant to be given all of them."""
        return self._edited(requests)

    def written(self) -> Weights | None:
        """Within an edit, what it has made of the weights of :meth:`changed_layers`; None where that is not all that it
        changes."""
        layers = self.changed_layers()
        if layers is None or not held_apart(layers):
            return None
        return {layer.name: self._weight(layer).detach() for layer in layers}

    def _weight(self, layer: Layer) -> torch.Tensor:
        """A copy of the layer's weight as the edit has it."""
        return layer.weight.clone()

    def predict(self, prompts: Sequence[str]) -> list[str]:
        """Greedy answers of ``subject.model`` as it is now."""
        return answer(self.subject, prompts)

    def _clock(self) -> float:
        if self.subject.device.type == "cuda":
            torch.cuda.synchronize(self.subject.device)
        return time.perf_counter()


class Untrained(System):
    """A system that has nothing to train, and nothing to keep."""

    fitted = False

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
def restored(weights: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Within the block ``weights`` may be written; afterwards they have their old bits. Yields copies of those."""
    before = [weight.detach().clone() for weight in weights]
    try:
        yield before
    finally:
        with torch.no_grad():
            for weight, old in zip(weights, before, strict=True):
                weight.copy_(old)


class _Asked(nn.Module):
    """A model as a function of its weights and of what is asked of it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ask: Callable[[nn.Module, Batch], Rows], batch: Batch) -> Rows:
        return ask(self.model, batch)


def call(
    model: nn.Module, weights: Mapping[str, torch.Tensor], ask: Callable[[nn.Module, Batch], Rows], batch: Batch
) -> Rows:
    """``ask(model, batch)`` where the named weights have other values; differentiable in those.

    ``ask`` is :func:`mendfast.objective.target_rows` or :func:`~mendfast.objective.kept_rows`.
    """
    weights = {f"model.{name}": weight for name, weight in weights.items()}
    return torch.func.functional_call(_Asked(model), weights, (ask, batch))
