"""y - alpha (x u^T) delta and its gradients, from the three contractions of ``_products``.

    c = x u^T                      [B, S, T]   project, the width m split over programs
    out = y - alpha c delta        [B, S, n]   expand
    e = dout delta^T               [B, S, T]   project
    dx = -alpha e u                            expand
    du = -alpha e^T x,   ddelta = -alpha c^T dout      outer
    dalpha = -sum c * e

Nothing is larger than the layer's own inputs and outputs. The rows are read in their dtype, multiplied in
float32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ._products import expand, outer, project

PRECISION = "tf32x3"
"""float32 accuracy on matrix units; the op has no argument for it."""


class Needs(NamedTuple):
    """Which gradients are asked for."""

    x: bool
    u: bool
    delta: bool
    alpha: bool


def _flat(x: torch.Tensor, batched: bool) -> torch.Tensor:
    return x if batched else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def forward(y, x, u, delta, *, alpha, scale) -> tuple[torch.Tensor, torch.Tensor]:
    """(out in y's dtype, c [..., T] float32)"""
    batched = u.dim() == 3
    c = project([_flat(x, batched)], u, [], 0.0, PRECISION)
    rows = _flat(y, batched)
    out = torch.empty(rows.shape, dtype=y.dtype, device=y.device)
    expand(c, delta.mT, rows, out, PRECISION, scale=-scale, alpha=alpha)
    return out.view(y.shape), c.view(*x.shape[:-1], u.shape[-2])


def backward(grad, x, u, delta, c, *, alpha, scale, needs: Needs) -> list[torch.Tensor]:
    """The gradients that are needed, in the order x, u, delta, alpha."""
    batched = u.dim() == 3
    g, c, rows = _flat(grad, batched), _flat(c, batched), _flat(x, batched)
    by = {"scale": -scale, "alpha": alpha}
    out = []
    e = project([g], delta, [], 0.0, PRECISION) if needs.x or needs.u or needs.alpha else None
    if needs.x:
        d_x = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
        out.append(expand(e, u.mT, None, d_x, PRECISION, **by).view(x.shape))
    if needs.u:
        d_u = torch.empty(u.shape, dtype=u.dtype, device=x.device)
        outer([rows], e, [], 0.0, d_u.mT, PRECISION, **by)
        out.append(d_u)
    if needs.delta:
        d_delta = torch.empty(delta.shape, dtype=delta.dtype, device=x.device)
        outer([g], c, [], 0.0, d_delta.mT, PRECISION, **by)
        out.append(d_delta)
    if needs.alpha:
        out.append(-(c * e).sum().to(alpha.dtype).reshape(alpha.shape))
    return out
