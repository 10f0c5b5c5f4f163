"""LoRA (Hu et al. 2022, arXiv:2106.09685) by peft: fine-tuning of low-rank adapters on the edited matrices."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from importlib.util import find_spec

import torch

from ..capture import frozen
from ..editable import EditableModel
from ..layers import Layer
from ..requests import EditRequest
from .fine_tuning import MAX_STEPS, FineTuning


class Lora(FineTuning):
    """Adam on adapters ``W + (alpha / rank) B A``, until every target token is the first choice.

    Args:
        subject, learning_rate, max_steps: see :class:`FineTuning`.
        rank: of the adapters.
        alpha: their scale, times the rank.
        seed: of A at the start; B is 0.

    Raises:
        ValueError: peft is not installed.
    """

    key, name = "lora", "LoRA"

    def __init__(
        self,
        subject: EditableModel,
        learning_rate: float = 1e-3,
        max_steps: int = MAX_STEPS,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        seed: int = 0,
    ):
        super().__init__(subject, learning_rate, max_steps)
        if find_spec("peft") is None:
            raise ValueError("LoRA needs peft: pip install peft (it comes with mendfast[peft]), or leave lora out.")
        self.rank, self.alpha, self.seed = rank, alpha, seed

    @torch.no_grad()
    def _weight(self, layer: Layer) -> torch.Tensor:
        adapted = self.subject.model.get_submodule(layer.name.removesuffix(".weight"))
        return layer.weight + adapted.get_delta_weight("default").to(layer.weight.dtype)

    @contextlib.contextmanager
    def _trained(self, groups: Sequence[Sequence[EditRequest]]) -> Iterator[None]:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel

        model = self.subject.model
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=0.0,
            target_modules=[layer.name.removesuffix(".weight") for layer in self.layers],
            fan_in_fan_out=all(layer.layout == "in_out" for layer in self.layers),
        )
        before = vars(model).get("peft_config")
        tuner = None
        device = self.subject.device
        try:
            with frozen(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed(self.seed)
                tuner = LoraModel(model, config, "default")
                weights = [parameter for name, parameter in model.named_parameters() if ".lora_" in name]
            self._one_by_one(weights, [], groups)
            yield
        finally:
            if tuner is not None:
                tuner.unload()
            vars(model).pop("peft_config", None)
            if before is not None:
                model.peft_config = before
