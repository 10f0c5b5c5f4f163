"""Negative log-likelihood of the labelled tokens."""

from __future__ import annotations

import torch

from ..types import IGNORE


def token_nll_rows(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:  # [N, V], [N] -> [N]
    """-log softmax(logits)[label] of each row; 0 where the label is -100. float32 at least."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    kept = labels != IGNORE
    target = labels.where(kept, 0).long()
    nll = logits.logsumexp(-1) - logits.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return nll.where(kept, 0)


def token_nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:  # [B, S, V], [B, S] -> [B]
    """Mean over each sample's labelled tokens (label != -100) of -log softmax(logits)[label].

    ``logits[b, s]`` predicts ``labels[b, s]``: a causal model's shift is the caller's.
    A sample without labels gives 0.
    """
    rows = token_nll_rows(logits.flatten(0, -2), labels.flatten()).view(labels.shape[0], -1)
    return rows.sum(-1) / (labels != IGNORE).view(labels.shape[0], -1).sum(-1).clamp(min=1)
