"""The locality term: KL(base || edited) over the kept positions."""

from __future__ import annotations

import torch


def kl_divergence_rows(base_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:  # [N, V] x 2 -> [N]
    """sum_v p_v (log p_v - log q_v) with p = softmax(base_logits), a constant, and q = softmax(logits)."""
    kind = torch.promote_types(logits.dtype, torch.float32)
    log_p = base_logits.detach().to(kind).log_softmax(-1)
    log_q = logits.to(kind).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def kl_divergence(
    base_logits: torch.Tensor,  # [B, S, V]
    logits: torch.Tensor,  # [B, S, V]
    mask: torch.Tensor,  # [B, S], nonzero = kept
) -> torch.Tensor:  # [B]
    """Mean of the kept positions' KL(softmax(base_logits) || softmax(logits)), per sample.

    No gradient reaches ``base_logits``. A sample that keeps nothing gives 0.
    """
    kept = (mask != 0).view(mask.shape[0], -1)
    rows = kl_divergence_rows(base_logits.flatten(0, -2), logits.flatten(0, -2)).view(kept.shape)
    return rows.where(kept, 0).sum(-1) / kept.sum(-1).clamp(min=1)
