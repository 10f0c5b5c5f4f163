"""A linear layer's output under a low-rank update of its weight."""

from __future__ import annotations

import torch


def lowrank_linear(
    y: torch.Tensor,  # [B, S, n], or [..., n] with shared factors
    x: torch.Tensor,  # [B, S, m], or [..., m]
    u: torch.Tensor,  # [B, T, m] each sample its own, or [T, m] one for all
    delta: torch.Tensor,  # [B, T, n], or [T, n]
    alpha: torch.Tensor | float,
) -> torch.Tensor:
    """``y - alpha (x u^T) delta``: what the layer gives with W - alpha delta^T u, where y = W x (+ bias).

    Computed in the widest of float32 and the arguments' types, returned in y's.
    """
    kind = torch.promote_types(torch.promote_types(y.dtype, u.dtype), torch.float32)
    update = (x.to(kind) @ u.to(kind).mT) @ delta.to(kind)
    return (y.to(kind) - alpha * update).to(y.dtype)
