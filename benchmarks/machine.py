"""The machine that a result comes from: what it is, and how fast it copies and multiplies at best."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import functools
import importlib.metadata
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mendfast.commands.doctor import cpu_name
from mendfast.ops import many_rows

PACKAGES = ("mendfast", "torch", "triton", "transformers", "numpy", "pytest-benchmark", "liger-kernel")


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def keep_memory() -> None:
    """Let glibc keep what is freed, as a GPU's allocator does: with fresh pages for large results, or without, as its
    heap happens to lie, a call of 12 ms takes 28, whoever makes it."""
    with contextlib.suppress(OSError, AttributeError):  # another system's library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        trim_threshold, mmap_max = -1, -4
        mallopt(trim_threshold, -1)
        mallopt(mmap_max, 0)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@functools.cache
def cache_bytes() -> int:
    """The last-level cache, past which input sets are rotated: a GPU's L2, a CPU's L3."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).L2_cache_size
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]]
    except (OSError, KeyError, ValueError):
        return 32 * 2**20


_ceilings: dict[str, float] = {}
_measured_at = -math.inf
MEASURED_AGAIN_AFTER = 20.0  # seconds


def _rate(amount: float, call: Callable[[], object], rounds: int = 3) -> float:
    """The best of some calls, after one that is not counted."""
    times = []
    for _ in range(rounds + 1):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        times.append(time.perf_counter() - start)
    return amount / min(times[1:])


@functools.cache
def _probes() -> dict[str, list[Callable[[], float]]]:
    on = device()
    big = on.type == "cuda"
    source = torch.randn(2**27 if big else 2**24, device=on)
    target, size = torch.empty_like(source), source.numel() * 4
    probes = {
        "bytes": [lambda: _rate(2 * size, lambda: target.copy_(source)), lambda: _rate(size, lambda: source.sum())]
    }
    side = 8192 if big else 1024
    for name in ("float32", "bfloat16") if big else ("float32",):
        a, b = (torch.randn(side, side, device=on, dtype=getattr(torch, name)) for _ in range(2))
        probes[name] = [lambda a=a, b=b: _rate(2 * side**3, lambda: a @ b)]
        if many_rows.served(a, b):
            probes[name].append(lambda a=a, b=b: _rate(2 * side**3, lambda: many_rows.mm(a, b)))
    return probes


def measure_ceilings() -> None:
    """Time a copy, a sum and matrix products once more; the best of the session stays.

    Done before a row, a few times a minute: a machine that others use too would else be taken for a slower one.
    float32 on a GPU is what its matrix units do in TF32, so that no float32 product can be above it.
    """
    global _measured_at
    if time.monotonic() - _measured_at < MEASURED_AGAIN_AFTER:
        return
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high" if device().type == "cuda" else precision)
        for name, probes in _probes().items():
            _ceilings[name] = max(_ceilings.get(name, 0.0), *(probe() for probe in probes))
    finally:
        torch.set_float32_matmul_precision(precision)
    _measured_at = time.monotonic()


def ceilings() -> dict[str, float]:
    """bytes/s ("bytes", the better of a copy and a sum) and flop/s by dtype: the best measured so far."""
    if not _ceilings:
        measure_ceilings()
    return dict(_ceilings)


def floor(moved: int, operations: int, dtype: str = "float32") -> float:
    """Seconds below which no implementation can be: the larger of moving the bytes and doing the operations."""
    rates = ceilings()
    return max(moved / rates["bytes"], operations / rates.get(dtype, rates["float32"]))


def _line(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe(command: str) -> dict:
    """Hardware, driver, versions, commit, command and date, for the head of a result file."""
    here = Path(__file__).parent
    status = _line("git", "-C", str(here), "status", "--porcelain", "--untracked-files=no", "--", "..")
    gpu = torch.cuda.is_available()
    return {
        "device": device().type,
        "name": torch.cuda.get_device_name() if gpu else cpu_name(),
        "gpu_driver": _line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None,
        "cuda": torch.version.cuda if gpu else None,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cache_bytes": cache_bytes(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _line("git", "-C", str(here), "rev-parse", "HEAD"),
        "uncommitted_changes": None if status is None else bool(status),
        "command": command,
        "date": datetime.date.today().isoformat(),
    }


def result_name(machine: dict) -> str:
    """``<machine>-<date>.json``"""
    words = machine["name"] if machine["device"] == "cuda" else f"{machine['cpu']} {machine['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") + f"-{machine['date']}.json"
