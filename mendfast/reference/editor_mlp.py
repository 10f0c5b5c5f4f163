"""The editor network over stacked rows (Mitchell et al. 2022, equations 3a, 3b and section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..types import EPS, Block, Stats


def editor_mlp(
    u: torch.Tensor,  # [N, m]
    delta: torch.Tensor,  # [N, n]
    stats: Stats | None,
    blocks: Sequence[Block],
    mode: torch.Tensor | None = None,  # [N] int
    *,
    precision: str = "tf32x3",
    residual: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise, concatenate, run the low-rank blocks, split::

        z = [(u - mu_u) / (sigma_u + 1e-7) ; (delta - mu_delta) / (sigma_delta + 1e-7)]
        z = z + max(0, s[mode] * (U V z + b) + o[mode])        for each block

    ``stats`` None: no normalisation. No blocks: the normalised rows. A side of width 0 is absent.
    ``residual=False`` leaves out "z +". Computed in the widest of float32 and the arguments' types,
    returned in the rows' own. ``precision`` is for matrix units; this code has plain arithmetic.
    """
    kind = torch.promote_types(u.dtype, torch.float32)
    if blocks:
        kind = torch.promote_types(kind, blocks[0][0].dtype)
    z_u, z_delta = u.to(kind), delta.to(kind)
    if stats is not None:
        u_mean, u_std, delta_mean, delta_std = (s.to(kind) for s in stats)
        z_u = (z_u - u_mean) / (u_std + EPS)
        z_delta = (z_delta - delta_mean) / (delta_std + EPS)
    z = torch.cat([z_u, z_delta], dim=-1)
    for block in blocks:
        U, V, b, s, o = (None if p is None else p.to(kind) for p in Block(*block))
        pre = (z @ V.T) @ U.T + b
        if s is not None:
            pre = s[mode.long()] * pre
        if o is not None:
            pre = pre + o[mode.long()]
        # clamp and not relu: at initialisation every pre-activation is exactly 0, and must pass its gradient
        act = pre.clamp(min=0)
        z = z + act if residual else act
    out_u, out_delta = z.split([u.shape[-1], delta.shape[-1]], dim=-1)
    return out_u.to(u.dtype), out_delta.to(delta.dtype)
