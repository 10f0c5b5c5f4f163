"""What every op needs: the library it is registered in, checks, and guards against ambient state."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch

from ..kernels._library import library_precision

LIBRARY = torch.library.Library("mendfast", "FRAGMENT")
ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_check_on_device = False


def define(schema: str, impl: Callable, fake: Callable) -> None:
    """Register ``mendfast::schema`` with one implementation for every device and its shape function."""
    LIBRARY.define(schema)
    name = schema.split("(")[0]
    LIBRARY.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mendfast::{name}", fake, lib=LIBRARY)


@contextlib.contextmanager
def checking(enabled: bool = True) -> Iterator[None]:
    """Within the block values on a GPU are checked too, at the price of a synchronisation per op.

    Values are modes in range, finite statistics, rows left by a mask. On the CPU they are always checked.
    """
    global _check_on_device
    previous, _check_on_device = _check_on_device, enabled
    try:
        yield
    finally:
        _check_on_device = previous


def checks_values(tensor: torch.Tensor) -> bool:
    return _check_on_device or tensor.device.type == "cpu"


@contextlib.contextmanager
def full_precision(device: torch.device, precision: str = "ieee") -> Iterator[None]:
    """Products inside the block are float32's, whatever autocast and the process's TF32 switches say.

    ``precision="tf32"`` lets a GPU's library round factors to TF32; "tf32x3" is made of such products by
    :func:`mendfast.kernels._library.matmul`, and is "ieee" for every other.
    """
    autocast = torch.is_autocast_enabled(device.type)
    with torch.autocast(device.type, enabled=False) if autocast else contextlib.nullcontext():
        with library_precision(device, precision):
            yield


def all_finite(values: torch.Tensor) -> torch.Tensor:
    """Whether no element is NaN or infinite, [] bool on their device: one pass that makes nothing of their size."""
    if not values.numel():
        return torch.ones((), dtype=torch.bool, device=values.device)
    low, high = torch.aminmax(values.detach())
    return torch.maximum(-low, high) < torch.inf


def non_finite(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Which of the tensors hold NaN or infinity, by index: one pass over each, one synchronisation per device.

    After :func:`rank1_update_group_` over its weights this finds a sum that left the weight's dtype: finite factors
    can have an infinite result, above 65,504 in float16.
    """
    verdicts: dict[torch.device, list[tuple[int, torch.Tensor]]] = {}
    for i, tensor in enumerate(tensors):
        verdicts.setdefault(tensor.device, []).append((i, all_finite(tensor)))
    bad = []
    for found in verdicts.values():
        finite = torch.stack([verdict for _, verdict in found]).tolist()
        bad += [i for (i, _), fine in zip(found, finite, strict=True) if not fine]
    return sorted(bad)


def same_device(op: str, **tensors: torch.Tensor | None) -> None:
    """ValueError unless all tensors are on one device."""
    first = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            first = (name, tensor.device)
        elif tensor.device != first[1]:
            raise ValueError(
                f"{op}: {name} is on {tensor.device} but {first[0]} on {first[1]}; move them to one device."
            )
