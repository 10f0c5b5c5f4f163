"""What every op needs: the library it is registered in, probes, and guards against ambient state."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator

import torch

LIBRARY = torch.library.Library("mendfast", "FRAGMENT")
ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PRECISIONS = ("tf32x3", "ieee", "tf32")

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
def _no_autocast(device_type: str) -> Iterator[None]:
    with torch.autocast(device_type, enabled=False):
        yield


_NOTHING = contextlib.nullcontext()


def full_precision(device: torch.device):
    """A context without autocast, which would make the products inside an op bfloat16."""
    return _no_autocast(device.type) if torch.is_autocast_enabled(device.type) else _NOTHING


@functools.cache
def triton_reason() -> str | None:
    """Why no Triton kernel can run here at all, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton isn't installed (pip install triton)"
    return None


def triton_probe(device: torch.device) -> str | None:
    """Why the Triton kernels can't serve ``device``, or None."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton kernels run on CUDA devices, and this is {device.type!r} (TRITON_INTERPRET=1 emulates)"
    return triton_reason()


def aten_probe(device: torch.device) -> str | None:
    return None


def all_finite(values: torch.Tensor) -> torch.Tensor:
    """Whether no element is NaN or infinite, [] bool on their device: one pass that makes nothing of their size."""
    if not values.numel():
        return torch.ones((), dtype=torch.bool, device=values.device)
    low, high = torch.aminmax(values.detach())
    return torch.maximum(-low, high) < torch.inf


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
