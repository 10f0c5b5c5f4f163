"""The edited blocks in bfloat16, where the machine has units for it; the editor and all losses stay in float32."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection

import torch
from torch import nn

from ..capture import replaced_forwards
from ..choice import stacks
from ..ops import widened

PRECISIONS = ("float32", "bfloat16")


def has_units(device: torch.device) -> bool:
    """Whether there are units for products in bfloat16: a GPU's, or those of AVX-512 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    return widened.has_units(torch.bfloat16)


def check_precision(precision: str, device: torch.device) -> None:
    """A ValueError where ``precision`` asks for units that the device lacks."""
    if precision != "float32" and not has_units(device):
        raise ValueError(
            f"precision is {precision!r}, and this {device.type} has no units for it (a CPU's are avx512_bf16 or "
            "amx_bf16), so that a step would take longer and be less exact; leave it at 'float32'."
        )


def lowered(
    model: nn.Module, frozen_blocks: Collection[nn.Module], on: bool
) -> contextlib.AbstractContextManager[None]:
    """Within the block a model's blocks that are not frozen compute their products in bfloat16 (torch.autocast).

    What they add to, the hidden states, keeps its dtype, and the head is no block.
    """
    if not on:
        return contextlib.nullcontext()
    blocks = [block for _, stack in stacks(model) for block in stack if block not in frozen_blocks]
    device = next(model.parameters()).device.type
    return replaced_forwards({block: functools.partial(_autocast, block.forward, device) for block in blocks})


def _autocast(forward: Callable, device: str, *args: object, **kwargs: object) -> object:
    with torch.autocast(device, torch.bfloat16, cache_enabled=False):
        return forward(*args, **kwargs)
