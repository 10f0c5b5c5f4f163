"""Many edits of one weight as one: least squares under a metric of what must stay. See docs/ops/least_squares.md."""

from __future__ import annotations

import torch

from ..types import Spectrum


def least_squares(
    u: torch.Tensor,  # [T, m], or [G, T, m]
    d: torch.Tensor,  # [T, n], or [G, T, n]
    spectrum: Spectrum,
    lam: torch.Tensor | float,
    mu: torch.Tensor | float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors (keys [.., T, m], delta [.., T, n]) of argmin_S sum_i |S u_i - d_i|^2 + tr(S M S^T) = -delta^T keys.

    keys = U (M + U^T U)^-1 and delta = -D, with M = lam tr(C) I + mu C, in float64, group by group; returned in
    u's type and d's, or float32 if that is wider.
    """
    eye = torch.eye(spectrum.vectors.shape[0], dtype=torch.float64, device=u.device)
    q = spectrum.vectors.double()
    leading = q @ q.T
    c = q @ spectrum.values.double().diag() @ q.T
    if q.shape[1] < q.shape[0]:
        c = c + spectrum.rest.double() * (eye - leading)
    metric = lam * spectrum.trace().double() * eye + mu * c
    groups = u.double().unsqueeze(0) if u.dim() == 2 else u.double()
    keys = [group @ torch.linalg.inv(metric + group.T @ group) for group in groups]
    keys = torch.stack(keys) if keys else groups
    keys = keys[0] if u.dim() == 2 else keys
    return keys.to(torch.promote_types(u.dtype, torch.float32)), -d.to(torch.promote_types(d.dtype, torch.float32))
