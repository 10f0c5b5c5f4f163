"""Weights that are spread over processes (DTensor: FSDP2, tensor parallelism): what of one lies here.

Every process applies and reverts an edit at the same time, each to its own slice, so that nothing is sent; only whether
all may go on is agreed on, and that where they might differ.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .types import modules_of


def is_sharded(weight: Any) -> bool:
    return isinstance(weight, torch.Tensor) and type(weight.data).__name__ == "DTensor"


def local(weight: torch.Tensor) -> torch.Tensor:
    """What lies here, sharing its memory: the weight itself where it isn't sharded."""
    return weight.detach().to_local() if is_sharded(weight) else weight


def full(weight: torch.Tensor) -> torch.Tensor:
    """All of it, gathered; every process must ask."""
    return weight.detach().full_tensor() if is_sharded(weight) else weight


def slices_of(weight: torch.Tensor) -> tuple[slice, slice]:
    """Which rows and columns of the whole weight :func:`local` holds.

    Raises:
        ValueError: it is divided in a way that is not known here.
    """
    if not is_sharded(weight):
        return slice(0, weight.shape[0]), slice(0, weight.shape[1])
    mesh, starts, sizes = weight.device_mesh, [0, 0], list(weight.shape)
    place = mesh.get_coordinate()
    for i, placement in enumerate(weight.placements):
        kind = type(placement).__name__
        if kind == "Replicate":
            continue
        if kind != "Shard" or place is None:
            raise ValueError(f"it is placed as {placement}")
        # as torch.chunk divides
        side, count = placement.dim, mesh.size(i)
        share = -(-sizes[side] // count)
        start = min(share * place[i], sizes[side])
        starts[side], sizes[side] = starts[side] + start, min(share, sizes[side] - start)
    if tuple(local(weight).shape) != tuple(sizes):
        raise ValueError(f"this process holds {tuple(local(weight).shape)} of it, and {tuple(sizes)} was expected")
    rows, columns = (slice(start, start + size) for start, size in zip(starts, sizes, strict=True))
    return rows, columns


def sliced(
    weight: torch.Tensor, u: torch.Tensor, delta: torch.Tensor, alpha: float, layout: str
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The factors of what lies here: those of the update's rows and columns that :func:`slices_of` names."""
    if not is_sharded(weight):
        return u, delta, alpha
    rows, columns = slices_of(weight)
    if layout == "in_out":
        rows, columns = columns, rows
    return u[:, columns].contiguous(), delta[:, rows].contiguous(), alpha


def anywhere(flags: Sequence[bool], weights: Sequence[torch.Tensor]) -> list[bool]:
    """Whether each weight's flag is set in any of the processes that share it; the flags themselves without such."""
    result = list(flags)
    for i, weight in enumerate(weights):
        if is_sharded(weight):
            result[i] = bool(_summed(torch.tensor(float(result[i])), weight))
    return result


def summed(value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A number for each part of a weight, added up over its parts, copies counted once."""
    if not is_sharded(weight):
        return value
    kinds = [type(placement).__name__ for placement in weight.placements]
    return _summed(value, weight, [i for i, kind in enumerate(kinds) if kind == "Shard"])


def _summed(value: torch.Tensor, weight: torch.Tensor, sides: Sequence[int] | None = None) -> torch.Tensor:
    value = value.detach().to(local(weight).device, copy=True)
    for i in range(weight.device_mesh.ndim) if sides is None else sides:
        torch.distributed.all_reduce(value, group=weight.device_mesh.get_group(i))
    return value


def reshard(model: nn.Module) -> None:
    """Let FSDP2 put its weights back where they belong: it keeps gathered ones after a forward pass of the outermost
    module, and what is written there is lost."""
    modules = modules_of(model)
    kinds = {kind for kind in {type(module) for module in modules} if _is_fsdp(kind)}
    for module in modules if kinds else ():
        if type(module) in kinds:
            module.reshard()


@functools.cache
def _is_fsdp(kind: type) -> bool:
    return any(base.__name__ == "FSDPModule" for base in kind.__mro__)
