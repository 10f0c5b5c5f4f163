"""Fine-tuning on the edit example: the baseline FT of Mitchell et al. (2022, section 5)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ..capture import frozen
from ..editor import MendEditor
from ..objective import nll, target_rows, to_device

MAX_STEPS = 100


class FineTuning:
    """Adam on the matrices that ``editor`` edits, until every target token is the first choice.

    Args:
        editor: names the model, its tokenisation and the matrices; its network is not used.
        learning_rate: Adam's.
        max_steps: where it gives up.
    """

    def __init__(self, editor: MendEditor, learning_rate: float = 1e-3, max_steps: int = MAX_STEPS):
        self.editor, self.learning_rate, self.max_steps = editor, learning_rate, max_steps
        self.steps, self.seconds = 0, 0.0  # of the last edit

    @contextlib.contextmanager
    def edited(self, requests: Sequence[tuple[str, str]]) -> Iterator[nn.Module]:
        """Within the block the model is fine-tuned on ``requests``, all at once; afterwards it has its old bits."""
        model = self.editor.model
        weights = [layer.weight for layer in self.editor.layers]
        before = [weight.detach().clone() for weight in weights]
        try:
            started = time.perf_counter()
            self._train(model, weights, requests)
            self.seconds = time.perf_counter() - started
            yield model
        finally:
            with torch.no_grad():
                for weight, old in zip(weights, before, strict=True):
                    weight.copy_(old)

    def _train(self, model: nn.Module, weights: list[nn.Parameter], requests: Sequence[tuple[str, str]]) -> None:
        batch = to_device(self.editor.tokenize(requests), weights[0].device)
        optimizer = torch.optim.Adam(weights, lr=self.learning_rate)
        with frozen(model), torch.enable_grad():
            for weight in weights:
                weight.requires_grad_(True)
            for step in range(self.max_steps + 1):
                self.steps = step
                rows = target_rows(model, batch)
                if step == self.max_steps or bool((rows.logits.argmax(-1) == rows.labels).all()):
                    break
                loss = nll(rows, len(requests)).mean()
                for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                    weight.grad = gradient
                optimizer.step()
            for weight in weights:
                weight.grad = None
                weight.requires_grad_(False)
