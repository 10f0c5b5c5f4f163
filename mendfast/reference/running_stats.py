"""Running mean and squared deviations, row by row (Welford 1962)."""

from __future__ import annotations

import torch


def running_stats_(
    count: torch.Tensor,  # one element
    mean: torch.Tensor,  # [d]
    m2: torch.Tensor,  # [d]
    rows: torch.Tensor,  # [N, d]
    mask: torch.Tensor | None = None,  # [N] bool, True = counted
) -> None:
    """Add ``rows`` to ``count``, ``mean`` and ``m2`` (the sum of squared deviations), in place.

    The variance is ``m2 / (count - 1)``. Rows whose mask is False are left out.
    """
    if mask is not None:
        rows = rows[mask.bool()]
    k, mu, s = count.double(), mean.double(), m2.double()
    for row in rows.double():
        k = k + 1
        new = mu + (row - mu) / k
        s = s + (row - mu) * (row - new)
        mu = new
    count.copy_(k)
    mean.copy_(mu)
    m2.copy_(s)
