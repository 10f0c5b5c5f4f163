"""W <- W - alpha sum_i delta_i u_i^T, by way of the full matrix (Mitchell et al. 2022, Algorithm 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def rank1_update_(
    weight: torch.Tensor,  # [n, m] ("out_in", nn.Linear) or [m, n] ("in_out", Conv1D)
    u: torch.Tensor,  # [T, m]
    delta: torch.Tensor,  # [T, n]
    alpha: float = 1.0,
    *,
    layout: str = "out_in",
    rounding: str = "nearest",
    seed: int = 0,
) -> torch.Tensor:
    """Subtract ``alpha * sum_i delta_i u_i^T`` from ``weight`` in place and return it.

    Accumulated in float32 (float64 for float64 weights). ``rounding="stochastic"`` rounds a 16-bit weight up
    or down with the probability that makes the mean right; ``seed`` fixes the draw.
    """
    kind = torch.promote_types(torch.promote_types(weight.dtype, u.dtype), torch.float32)
    left, right = (delta, u) if layout == "out_in" else (u, delta)
    exact = weight.to(kind) - alpha * (left.to(kind).T @ right.to(kind))
    if rounding == "stochastic" and weight.dtype != kind:
        exact = _stochastic(exact, weight.dtype, seed)
    return weight.copy_(exact)


def _stochastic(exact: torch.Tensor, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """One of the two neighbours of each value in ``dtype``, the nearer one more often."""
    near = exact.to(dtype)
    toward = torch.where(exact > near, torch.inf, -torch.inf).to(dtype)
    other = torch.nextafter(near, toward)
    gap = other.to(exact.dtype) - near.to(exact.dtype)
    chance = ((exact - near.to(exact.dtype)) / gap).where(gap.isfinite() & (gap != 0), 0)
    generator = torch.Generator(device=exact.device).manual_seed(seed)
    draw = torch.rand(exact.shape, generator=generator, device=exact.device, dtype=exact.dtype)
    return torch.where(draw < chance, other, near)


def rank1_update_group_(
    weights: Sequence[torch.Tensor],
    us: Sequence[torch.Tensor],
    deltas: Sequence[torch.Tensor],
    alphas: Sequence[float],
    *,
    layouts: Sequence[str] | None = None,
    rounding: str = "nearest",
    seed: int = 0,
) -> None:
    """:func:`rank1_update_` of every matrix; the i-th draws its rounding from ``seed + i``."""
    layouts = layouts or ["out_in"] * len(weights)
    for i, (weight, u, delta, alpha, layout) in enumerate(zip(weights, us, deltas, alphas, layouts, strict=True)):
        rank1_update_(weight, u, delta, alpha, layout=layout, rounding=rounding, seed=seed + i)
