"""Editable Neural Networks (Sinitsin et al., ICLR 2020): the model itself learns to be edited by gradient descent."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import ops
from ..capture import frozen
from ..editable import EditableModel
from ..objective import Batch, all_correct, kept_rows, nll, per_sample_mean, target_rows, to_device
from ..reference.token_nll import token_nll_rows
from ..requests import EditRequest
from ..training import TrainConfig
from ..training.data import Draw
from ..training.learner import LossPart
from .fitting import Fitted, best_gradient_step
from .system import call, restored


class _Editable(nn.Module):
    """A model, and the logarithm of the rate of each step for each edited matrix: [steps, matrices]."""

    def __init__(self, model: nn.Module, steps: int, matrices: int, rate: float, device: torch.device):
        super().__init__()
        self.model = model
        self.log_rates = nn.Parameter(torch.full((steps, matrices), rate, device=device).log())


class EditableNetwork(Fitted):
    """ENN: edits are ``steps`` steps of gradient descent on the edited matrices, at learned rates.

    The model is trained so that those few steps do. With W~ what the steps make of W, each of them
    ``W <- W - rate * grad_W L_e(W)``, Adam minimises, through the steps (second order),

        L_base(W) + c_edit L_e(W~) + c_loc KL(p_W0 || p_W~)

    This is the objective of Sinitsin et al. (section 3) with the choices that Mitchell et al. (2022, section 5)
    made for their comparison: plain gradient descent, a learned rate for each matrix, L_e(W~) on rephrasings. The
    KL is against the model before all training, W0, and L_base the loss of the locality inputs' known answers.
    The loss of simultaneous edits is the sum of theirs, so that with one step their update is the sum of the
    separate ones; the released code of Mitchell et al. takes the mean, which divides the step by their number.

    Args:
        subject: names the model, of which a copy is trained and edited; the caller's model stays as it is.
        steps: of gradient descent in an edit; each has rates of its own.
        rate: of each step before training; by default :func:`~mendfast.baselines.fitting.best_gradient_step`,
            divided among the steps.
        learning_rate: Adam's, of the model; the logarithms of the rates have ``config.alpha_learning_rate``.
        first_order: take the steps' gradients for constants. Needed for models whose attention can't be
            differentiated twice (FlashAttention); PyTorch's own is switched to one that can.
        c_base: weight of the model's own loss on known answers.
    """

    key, name, of_parameters = "enn", "ENN", True

    def __init__(
        self,
        subject: EditableModel,
        *,
        steps: int = 1,
        rate: float | None = None,
        learning_rate: float = 1e-4,
        first_order: bool = False,
        c_base: float = 1.0,
    ):
        if steps < 1 or (rate is not None and rate <= 0):
            raise ValueError(f"steps is {steps} and rate {rate}; there must be a step at least, at a positive rate.")
        self.original = subject.model
        model = copy.deepcopy(subject.model).eval()
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.dtype.is_floating_point)
        super().__init__(EditableModel(model, subject.tokenizer, subject.config))
        self.rate = rate
        self.network = _Editable(model, steps, len(self.subject.layers), rate or 1e-2, self.subject.device)
        self.learning_rate, self.first_order, self.c_base = learning_rate, first_order, c_base

    @torch.no_grad()
    def start(self, draw: Draw, config: TrainConfig) -> None:
        if self.rate is None:
            rates = self.network.log_rates
            rates.fill_(math.log(best_gradient_step(self.subject, draw, config) / len(rates)))

    def settings(self) -> dict[str, Any]:
        """The base model is what is trained: its weights come from the checkpoint."""
        return {name: value for name, value in super().settings().items() if name != "base model"}

    def parameter_groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        model = [parameter for parameter in self.subject.model.parameters() if parameter.requires_grad]
        return [
            {"params": model, "lr": self.learning_rate},
            {"params": [self.network.log_rates], "lr": config.alpha_learning_rate},
        ]

    def losses(self, draw: Draw, config: TrainConfig, joint: int) -> Iterator[LossPart]:
        groups = len(draw.inner) // joint
        for i in range(groups):
            pairs = [part[i * len(part) // groups : (i + 1) * len(part) // groups] for part in draw]
            inner, outer, loc = (to_device(self.subject.tokenize(part), self.subject.device) for part in pairs)
            loss, metrics = self.loss(inner, outer, loc, config, joint)
            yield loss / groups, metrics

    def loss(self, inner: Batch, outer: Batch, loc: Batch, config: TrainConfig, joint: int = 1) -> LossPart:
        """The loss of one edit by all samples of ``inner``, which should answer ``outer`` and leave ``loc`` alone."""
        model, outers, locs = self.subject.model, len(outer["input_ids"]), len(loc["input_ids"])
        weights = {layer.name: layer.weight for layer in self.subject.layers}
        edited = self.descend(weights, inner, create_graph=not self.first_order)
        with torch.no_grad(), frozen(self.original):
            base = kept_rows(self.original, loc)
        after = call(model, edited, kept_rows, loc)
        answers = call(model, edited, target_rows, outer)
        l_base = nll(target_rows(model, loc), locs).mean()
        l_edit = nll(answers, outers).mean()
        kl = ops.kl_divergence_rows(base.logits, after.logits)
        l_loc = per_sample_mean(kl, after.sample, locs).mean()
        parts = {"l_base": l_base, "l_edit": l_edit, "l_loc": l_loc}
        parts["edit_success"] = all_correct(answers, outers).float().mean()
        total = self.c_base * l_base + config.c_edit * l_edit + config.locality_weight(joint) * l_loc
        return total, {name: part.detach() for name, part in parts.items()}

    @torch.enable_grad()
    def descend(self, weights: dict[str, torch.Tensor], batch: Batch, *, create_graph: bool) -> dict[str, torch.Tensor]:
        """The weights after the steps; with ``create_graph`` differentiable in the first ones through the gradients."""
        size = len(batch["input_ids"])
        for rates in self.network.log_rates.exp():
            # Neither fused attention nor the op of the loss can be differentiated twice.
            with sdpa_kernel(SDPBackend.MATH):
                rows = call(self.subject.model, weights, target_rows, batch)
                loss = per_sample_mean(token_nll_rows(rows.logits, rows.labels), rows.sample, size).sum()
                gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=create_graph)
            weights = {
                name: weight - (rate * gradient).to(weight.dtype)
                for (name, weight), rate, gradient in zip(weights.items(), rates, gradients, strict=True)
            }
        return weights

    def _edited(self, requests: Sequence[EditRequest]) -> contextlib.AbstractContextManager:
        return self._descended([requests])

    def _edited_in_turn(self, requests: Sequence[EditRequest]) -> contextlib.AbstractContextManager:
        return self._descended([[request] for request in requests])

    @contextlib.contextmanager
    def _descended(self, groups: Sequence[Sequence[EditRequest]]) -> Iterator[None]:
        """One edit after the other, each by all requests of its group."""
        weights = {layer.name: layer.weight for layer in self.subject.layers}
        with restored(list(weights.values())):
            for requests in groups:
                batch = to_device(self.subject.tokenize(requests), self.subject.device)
                leaves = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
                with frozen(self.network):
                    edited = self.descend(leaves, batch, create_graph=False)
                with torch.no_grad():
                    for name, weight in weights.items():
                        weight.copy_(edited[name])
            yield
