"""The tuples and constants that ops, kernels and the reference share, and what they ask of modules."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

EPS = 1e-7
"""Added to every standard deviation before dividing by it."""
IGNORE = -100
"""The label of what is not a target, as Hugging Face has it."""
PRECISIONS = ("tf32x3", "ieee", "tf32")
"""How matrix units may multiply float32: as three TF32 products, as plain multiply-adds, as one TF32 product."""

C_EDIT = 1.0
"""Weight of the edit's loss beside the locality loss by default (Mitchell et al. 2022: 0.1)."""


class Stats(NamedTuple):
    """Mean and standard deviation of the rows that an editor normalises by; float32."""

    u_mean: torch.Tensor  # [m]
    u_std: torch.Tensor  # [m]
    delta_mean: torch.Tensor  # [n]
    delta_std: torch.Tensor  # [n]


class Block(NamedTuple):
    """One low-rank block: h = x + max(0, s[mode] * (U V x + b) + o[mode]).

    ``s`` and ``o`` are None in an editor that serves a single layer (scale 1, shift 0).
    """

    U: torch.Tensor  # [D, R]
    V: torch.Tensor  # [R, D]
    b: torch.Tensor  # [D]
    s: torch.Tensor | None = None  # [modes, D]
    o: torch.Tensor | None = None  # [modes, D]


class Spectrum(NamedTuple):
    """A second moment C = Q diag(values) Q^T + rest (I - Q Q^T), [m, m]: its leading k eigenvectors, and one number
    for all other directions. With k = m it is C, and ``rest`` plays no part; with k = 0 a multiple of I."""

    values: torch.Tensor  # [k] >= 0, float64
    vectors: torch.Tensor  # [m, k], orthonormal columns, float64 (float32 is taken too)
    rest: torch.Tensor  # [] >= 0, float64

    def trace(self) -> torch.Tensor:
        """tr(C), [] float64: E |x|^2."""
        m, k = self.vectors.shape
        return self.values.sum() + (m - k) * self.rest

    def to(self, device: torch.device | str) -> Spectrum:
        return Spectrum(*(part.to(device) for part in self))


def is_conv1d(kind: type) -> bool:
    """Hugging Face's Conv1D, known by its name: importing transformers to ask takes longer than all else here."""
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def modules_of(module: nn.Module) -> list[nn.Module]:
    """``list(module.modules())``, which makes a generator for each level of each."""
    found, left = dict.fromkeys([module]), list(reversed(module._modules.values()))
    while left:
        below = left.pop()
        if below is not None and below not in found:
            found[below] = None
            left += reversed(below._modules.values())
    return list(found)
