"""UltraEdit (Gu et al. 2025, arXiv:2505.14679): one step of linear algebra from inputs and gradients, no network."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from .. import ops
from ..editable import EditableModel
from ..layers import Layer
from ..requests import EditRequest
from ..types import EPS, Spectrum
from .system import Untrained, restored
from .turns import numbered, take

_NOTHING = 1e-300
"""A weight that must be above 0, and adds nothing to a ridge in float64."""


def isotropic(m: int, device: torch.device | str = "cpu") -> Spectrum:
    """C = I / m, of trace 1: under it ops.least_squares has the ridge lambda I."""
    one = torch.ones((), dtype=torch.float64, device=device)
    return Spectrum(one.new_zeros(0), one.new_zeros(m, 0), one / m)


class UltraEdit(Untrained):
    """Turn after turn of edits, each solved by itself on the model as those before have left it.

    With h a row's input, g its gradient, and (h', g') both normalised by the mean and deviation of all rows of this
    turn and of those before ("lifelong normalisation"; layers of one shape share theirs), each row wants
    ``v = -eta |h'|^2 g'`` at h, and the turn's change of the weight is ``V^T H (H^T H + I)^-1``.

    Statistics begin anew with every edit that is measured, so that none depends on what was measured before it.

    Args:
        subject: see :class:`System`.
        learning_rate: eta.
        turn: edits in each turn.
    """

    key, name = "ultraedit", "UltraEdit"

    def __init__(self, subject: EditableModel, learning_rate: float = 1e-6, turn: int = 100):
        super().__init__(subject)
        self.learning_rate, self.turn = learning_rate, turn

    def changed_layers(self) -> Sequence[Layer]:
        return self.subject.layers

    @contextlib.contextmanager
    def _edited(self, requests: Sequence[EditRequest]) -> Iterator[None]:
        layers, device = self.subject.layers, self.subject.device
        normalisers = {layer.shape: _Normaliser(*layer.shape, device) for layer in layers}
        weights, turns, done = [layer.weight for layer in layers], self.turns, 0
        with restored(weights):
            if turns is not None:
                done, state = turns.resume(requests)
                if done:
                    take(weights, state)
                    for i, normaliser in enumerate(normalisers.values()):
                        normaliser.load([state[f"rows.{i}.{part}"] for part in range(3)])
            for start in range(done, len(requests), self.turn):
                self._take(requests[start : start + self.turn], normalisers)
                done = min(start + self.turn, len(requests))
                if turns is not None and turns.due(done, len(requests)):
                    rows = {f"rows.{i}.{part}": tensor for i, one in enumerate(normalisers.values())
                            for part, tensor in enumerate((one.count, one.mean, one.m2))}  # fmt: skip
                    turns.keep(done, numbered(weights) | rows)
            yield

    @torch.no_grad()
    def _take(self, requests: Sequence[EditRequest], normalisers: dict[tuple[int, int], _Normaliser]) -> None:
        captured = self.subject.gradients(self.subject.tokenize(requests))
        rows = {layer.name: _rows(layer, *captured[layer.name]) for layer in self.subject.layers}
        for layer in self.subject.layers:
            normalisers[layer.shape].add(torch.cat(rows[layer.name], 1))
        for layer in self.subject.layers:
            h, g = rows[layer.name]
            if not len(h):
                continue
            normal_h, normal_g = normalisers[layer.shape](torch.cat([h, g], 1)).split(layer.shape, 1)
            v = -self.learning_rate * normal_h.square().sum(1, keepdim=True) * normal_g
            keys, delta = ops.least_squares(h, v, isotropic(layer.m, h.device), 1.0, _NOTHING)
            ops.rank1_update_(layer.weight.data, keys, delta, layout=layer.layout)


def _rows(layer: Layer, u: torch.Tensor, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows that the loss reaches, float32."""
    u, delta = u.reshape(-1, layer.m).float(), delta.reshape(-1, layer.n).float()
    kept = (u != 0).any(1) & (delta != 0).any(1)
    return u[kept], delta[kept]


class _Normaliser:
    """Running mean and deviation of rows (h, g)."""

    def __init__(self, m: int, n: int, device: torch.device):
        self.count = torch.zeros(1, device=device, dtype=torch.float64)
        self.mean, self.m2 = torch.zeros(2, m + n, device=device, dtype=torch.float64)

    def add(self, rows: torch.Tensor) -> None:
        if len(rows):
            ops.running_stats_(self.count, self.mean, self.m2, rows)

    def load(self, parts: Sequence[torch.Tensor]) -> None:
        for own, part in zip((self.count, self.mean, self.m2), parts, strict=True):
            own.copy_(part)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        deviation = (self.m2 / (self.count - 1).clamp(min=1)).sqrt()
        return ((rows - self.mean) / (deviation + EPS)).float()
