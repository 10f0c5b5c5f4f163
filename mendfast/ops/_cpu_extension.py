"""The CPU extension (csrc/cpu): whether it can run here, and how tensors are handed to it."""

from __future__ import annotations

import functools

import torch

from .. import backends

KERNELS = ("instructions", "few_rows", "linear_nll", "outer_update", "kl_forward", "kl_backward", "running_stats")


def _problem() -> str | None:
    try:
        from .. import _cpu
    except ImportError as error:
        from ..build_info import build_info

        reason = build_info("cpu")["reason"]
        return str(reason or f"the CPU extension can't be loaded ({error}); install mendfast again")
    if not all(hasattr(_cpu, kernel) for kernel in KERNELS):
        return "the CPU extension is older than the package; install mendfast again"
    return _cpu.problem() or None


_PROBLEM = _problem()


def problem() -> str | None:
    """Why the CPU extension can't run on this machine, or None."""
    return _PROBLEM


def instructions() -> str:
    """What the kernels of the CPU extension, which can run here, are compiled for: "avx512" or "avx2"."""
    from .. import _cpu

    return str(_cpu.instructions())


def row_major(x: torch.Tensor) -> torch.Tensor:
    """x [N, K] itself if its rows are contiguous and lie apart, else a copy."""
    return x if x.stride(1) == 1 and row_stride(x) >= x.shape[1] else x.contiguous()


def row_stride(x: torch.Tensor) -> int:
    """From row to row; PyTorch lets that of a single row be anything, 0 too."""
    return max(x.stride(0), x.shape[1]) if x.shape[0] == 1 else x.stride(0)


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def direct(op: str, backend: str | None, *tensors: torch.Tensor) -> bool:
    """Whether ``op`` may go to its kernel without PyTorch's dispatcher, which takes longer than a small call.

    The CPU's backend was chosen before, the tensors are PyTorch's own, strided and on the CPU, and nobody records or
    transforms what is done. Not to be asked by a compiler.
    """
    for x in tensors:
        if not (type(x) in _PLAIN and x.is_cpu and x.layout is torch.strided and not x.is_neg()):
            return False
    return (
        backends.settled(op, "cpu", "cpu", backend)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._is_tracing()
    )


@functools.cache
def kind_of(dtype: torch.dtype) -> str:
    """The dtype's name, as the extensions take it."""
    return str(dtype).removeprefix("torch.")


backends.MISSING["cpu"] = lambda: problem()
