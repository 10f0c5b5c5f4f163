"""How the kernels over the vocabulary are cut: rows of [B, S, V] logits, each for one program or more."""

from __future__ import annotations

import torch

from . import configs
from .configs import cdiv


def plan(logits: torch.Tensor) -> tuple[configs.SweepConfig, int, int]:
    """(configuration, splits, chunk): few rows are split along the vocabulary so that they fill the chip."""
    batch, length, vocabulary = logits.shape
    config = configs.lookup("vocabulary_fwd", logits.device, batch * length)
    wanted = cdiv(configs.sm_count(logits.device) * config.programs_per_sm, batch * length)
    blocks = cdiv(vocabulary, config.block_d)
    chunk = cdiv(blocks, min(wanted, blocks)) * config.block_d
    return config, cdiv(vocabulary, chunk), chunk


def row_major(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.stride(-1) == 1 else logits.contiguous()
