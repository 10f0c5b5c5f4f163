"""W <- W - alpha sum_i delta_i u_i^T, by way of the full matrix (Mitchell et al. 2022, Algorithm 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_WORD = 0xFFFFFFFF


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
    if rounding == "stochastic" and weight.dtype in (torch.bfloat16, torch.float16):
        exact = round_stochastic(exact, weight.dtype, draws(seed, *exact.shape, device=exact.device))
    return weight.copy_(exact)


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


def round_stochastic(exact: torch.Tensor, dtype: torch.dtype, draw: torch.Tensor) -> torch.Tensor:
    """``exact`` in ``dtype``: one of its two neighbours, so that the mean over ``draw`` is ``exact``.

    Toward zero, plus one unit in the last place where the part cut off, in units of 2^-16, and the draw (0 to
    65535) together reach 65536 - 1/2. What is, or would become, infinite is rounded to nearest.
    """
    near = exact.to(dtype)
    magnitude = near.view(torch.int16) & 0x7FFF
    # bit patterns of floats of one sign are ordered as their magnitudes are
    low = torch.where(near.to(exact.dtype).abs() > exact.abs(), magnitude - 1, magnitude)
    sign = near.view(torch.int16) & -0x8000
    below, above = (low | sign).view(dtype), ((low + 1) | sign).view(dtype)
    unit = above.to(exact.dtype) - below.to(exact.dtype)
    cut_off = (exact - below.to(exact.dtype)) / unit * 65536
    rounded = torch.where(cut_off > 65535.5 - draw.to(exact.dtype), above, below)
    return torch.where(above.isfinite() & near.isfinite() & exact.isfinite(), rounded, near)


def draws(seed: int, rows: int, cols: int, *, first_row: int = 0, device=None) -> torch.Tensor:  # [rows, cols] int64
    """16 random bits for each element, a function of seed, row and column alone.

    Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") with the seed as key and
    (column // 8, row, 0, 0) as counter; its four words serve eight columns, low halves first.
    """
    blocks = (cols + 7) // 8
    row = torch.arange(first_row, first_row + rows, device=device, dtype=torch.int64)[:, None]
    zero = torch.zeros((rows, blocks), device=device, dtype=torch.int64)
    counter = [torch.arange(blocks, device=device, dtype=torch.int64) + zero, row + zero, zero, zero]
    key = [seed & _WORD, seed >> 32 & _WORD]
    for _ in range(10):
        # 64-bit products wrap around into the sign; their halves are right all the same
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            (second >> 32 & _WORD) ^ counter[1] ^ key[0],
            second & _WORD,
            (first >> 32 & _WORD) ^ counter[3] ^ key[1],
            first & _WORD,
        ]
        key = [key[0] + 0x9E3779B9 & _WORD, key[1] + 0xBB67AE85 & _WORD]
    halves = [half for word in counter for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, dim=-1).view(rows, blocks * 8)[:, :cols]
