"""Block sizes of every kernel per GPU generation: frozen, validated, one table.

The shipped values follow from counting (tiles that fill the chip, shared memory, registers without spills as
``mendfast.kernels.aot`` reports). ``python -m mendfast.kernels.tune`` times the valid ones at one shape and writes
a table that is read here: on an H200, tuned at GPT-J's 60 rows, training passes there were 8 % faster, and an edit of
distilGPT-2's shape 40 % slower, so that the counted ones stay. The precision of a product is an argument of the ops
and never a field of a configuration.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

ARCHS = ("sm_80", "sm_90", "sm_100")
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
"""Bytes of shared memory that one block of the data-centre chip of a generation can have."""
SMS = {"sm_80": 108, "sm_90": 132, "sm_100": 148}
ACCUMULATORS_PER_THREAD = 128
"""float32 accumulators above which a thread has too few of its 255 registers left for operands."""


def _power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


@dataclass(frozen=True)
class ProductConfig:
    """A tile of ``block_o`` outputs (a weight's side) by ``block_n`` rows, reduced ``block_k`` at a time."""

    block_o: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    programs_per_sm: int = 2
    registers: int | None = None
    """A cap per thread, so that programs_per_sm fit; None leaves it to the assembler."""

    def problem(self, shared_limit: int) -> str | None:
        """Why this configuration can't be launched, or None."""
        for name in ("block_o", "block_n", "block_k", "warps"):
            if not _power_of_two(getattr(self, name)):
                return f"{name} {getattr(self, name)} is no power of two"
        if min(self.block_o, self.block_n, self.block_k) < 16:
            return "every side of a tile must be at least 16"
        if not 1 <= self.warps <= 16 or not 1 <= self.stages <= 8 or self.programs_per_sm < 1:
            return "warps go from 1 to 16, stages from 1 to 8, programs_per_sm from 1"
        if self.registers is not None and not 32 <= self.registers <= 255:
            return f"registers {self.registers} is outside 32 to 255"
        if self.block_o * self.block_n > ACCUMULATORS_PER_THREAD * 32 * self.warps:
            return f"{self.block_o} x {self.block_n} accumulators are too many for {self.warps} warps"
        if self.shared_bytes() > shared_limit:
            return f"about {self.shared_bytes()} bytes of shared memory; the limit is {shared_limit}"
        return None

    def shared_bytes(self) -> int:
        """Float32 operand tiles of all stages, and one more row tile: the split halves of tf32x3."""
        tile, rows = 4 * self.block_o * self.block_k, 4 * self.block_n * self.block_k
        return self.stages * (tile + rows) + rows

    def limits(self) -> dict[str, int]:
        """The launch option for the cap."""
        return {} if self.registers is None else {"maxnreg": self.registers}

    def for_rows(self, rows: int) -> ProductConfig:
        """The same with tiles no taller than the rows there are."""
        needed = max(16, 1 << (rows - 1).bit_length())
        return self if needed >= self.block_n else dataclasses.replace(self, block_n=needed)


@dataclass(frozen=True)
class SweepConfig:
    """A tile of ``block_n`` rows by ``block_d`` columns of an elementwise or column-reducing kernel."""

    block_n: int
    block_d: int
    warps: int
    programs_per_sm: int = 4

    def problem(self, shared_limit: int) -> str | None:
        for name in ("block_n", "block_d", "warps"):
            if not _power_of_two(getattr(self, name)):
                return f"{name} {getattr(self, name)} is no power of two"
        if not 1 <= self.warps <= 16 or self.programs_per_sm < 1:
            return "warps go from 1 to 16, programs_per_sm from 1"
        if self.block_n * self.block_d > 64 * 32 * self.warps:
            return f"{self.block_n} x {self.block_d} elements are too many for {self.warps} warps"
        return None

    def for_rows(self, rows: int) -> SweepConfig:
        return self


Config = ProductConfig | SweepConfig

_WIDE, _OUTER = ProductConfig(128, 64, 32, 8, 3), ProductConfig(64, 64, 32, 4, 2)
# Left alone, the assembler spills bfloat16 products to keep to 168 registers; two programs may have 255.
_NARROW = ProductConfig(64, 64, 32, 4, 3, registers=255)
_PRODUCTS: dict[str, dict[str, Config]] = {
    # Warp-level matrix units: accumulators and both operands in registers, so 64 x 64 in 4 warps.
    "sm_80": {
        "project": _NARROW,
        "block_fwd": _NARROW,
        "expand": _NARROW,
        "outer": dataclasses.replace(_OUTER, registers=255),
    },
    # project: 15 tiles of 128 fill 132 multiprocessors in 8 splits, one program each. The others have 160 such
    # tiles and no splits: halves of 64 run three to a multiprocessor, all at once and not in two waves.
    "sm_90": {
        "project": ProductConfig(128, 64, 32, 8, 4, programs_per_sm=1),
        "block_fwd": ProductConfig(64, 64, 32, 4, 4),
        "expand": ProductConfig(64, 64, 32, 4, 4),
    },
    # Accumulators lie outside the registers, so that two wide programs fit.
    "sm_100": {"project": _WIDE, "block_fwd": _WIDE, "expand": _WIDE},
}
_SWEEPS = {
    "sum_splits": SweepConfig(1, 1024, 4),
    "gate_bwd": SweepConfig(16, 128, 4),
    "pointwise_fwd": SweepConfig(8, 256, 4),
    "normalise": SweepConfig(8, 256, 4),
    "running_stats": SweepConfig(32, 64, 4),
    "vocabulary_fwd": SweepConfig(1, 4096, 8),
    "vocabulary_bwd": SweepConfig(1, 4096, 8),
}
SHIPPED: dict[str, dict[str, Config]] = {
    arch: {"outer": _OUTER, **_PRODUCTS[arch], **_SWEEPS} for arch in ARCHS
}
# The interpreter runs on the CPU with small shapes: small tiles, so that several are needed.
INTERPRETER: dict[str, Config] = {
    **{name: ProductConfig(16, 16, 16, 1, 1, 1) for name in ("project", "block_fwd", "expand", "outer")},
    **{name: SweepConfig(4 if name not in ("sum_splits", "vocabulary_fwd", "vocabulary_bwd") else 1, 32, 1)
       for name in _SWEEPS},
}  # fmt: skip
for _arch, _table in SHIPPED.items():
    for _name, _config in _table.items():
        _problem = _config.problem(SHARED_LIMIT[_arch])
        if _problem:
            raise ValueError(f"configuration {_name} for {_arch}: {_problem}")


_PLACES = ("MENDFAST_KERNEL_TABLE", "XDG_CACHE_HOME", "HOME")


def table_path() -> Path:
    """Where ``tune`` writes and launchers read: ``MENDFAST_KERNEL_TABLE``, else the user's cache."""
    explicit = os.environ.get("MENDFAST_KERNEL_TABLE")
    if explicit:
        return Path(explicit)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "mendfast" / "kernels.json"


def key(kernel: str, precision: str | None) -> str:
    return kernel if precision is None else f"{kernel}/{precision}"


@functools.cache
def tuned(path: Path, device_name: str) -> dict[str, Config]:
    """The configurations that were timed on a GPU of this name; empty without a table."""
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text())["devices"].get(device_name, {})
        return {name: _from_json(fields) for name, fields in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no table of kernel configurations ({error}); delete it, or write it anew with "
            "`python -m mendfast.kernels.tune`."
        ) from error


def _from_json(fields: dict) -> Config:
    return (ProductConfig if "block_o" in fields else SweepConfig)(**fields)


def arch_of(capability: tuple[int, int]) -> str:
    """The generation whose table serves a compute capability."""
    major = capability[0]
    if major < 8:
        raise RuntimeError(f"Compute capability {capability} is too old: Triton's kernels need 8.0 or newer.")
    return "sm_80" if major == 8 else "sm_90" if major == 9 else "sm_100"


_pretended: str | None = None
_forced: dict[str, Config] = {}


@contextlib.contextmanager
def force(kernel: str, config: Config) -> Iterator[None]:
    """Within the block ``kernel`` runs with this configuration: for timing and for tests."""
    previous = dict(_forced)
    _forced[kernel] = config
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(previous)


@contextlib.contextmanager
def pretend(arch: str) -> Iterator[None]:
    """Within the block launchers choose as if for this generation: for compilation without a GPU."""
    global _pretended
    if arch not in ARCHS:
        raise ValueError(f"Architecture {arch!r} is unknown; there are {', '.join(ARCHS)}.")
    previous, _pretended = _pretended, arch
    try:
        yield
    finally:
        _pretended = previous


@functools.cache
def _device(index: int) -> tuple[str, str, int, int]:
    props = torch.cuda.get_device_properties(index)
    limit = getattr(props, "shared_memory_per_block_optin", 99 * 1024)
    return props.name, arch_of((props.major, props.minor)), props.multi_processor_count, limit


def sm_count(device: torch.device) -> int:
    """Multiprocessors to fill; the interpreter pretends to three, so that reductions are split."""
    if _pretended is not None:
        return SMS[_pretended]
    return 3 if device.type != "cuda" else _device(torch.cuda._utils._get_device_index(device, True))[2]


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own looks at each argument for a constexpr, which takes longer than the rest of a
    launch's arithmetic."""
    return -(-a // b)


def lookup(kernel: str, device: torch.device, rows: int, precision: str | None = None) -> Config:
    """The configuration of ``kernel`` on ``device`` for so many rows: the timed one, else the shipped."""
    if kernel in _forced:
        return _forced[kernel].for_rows(rows)
    if _pretended is not None:
        config = shipped(_pretended, kernel, precision)
        return fitted(config, SHARED_LIMIT[_pretended]).for_rows(rows)
    if device.type != "cuda":
        return INTERPRETER[kernel].for_rows(rows)
    index = torch.cuda._utils._get_device_index(device, True)
    return _on_gpu(kernel, index, rows, precision, tuple(map(os.environ.get, _PLACES)))


@functools.lru_cache(maxsize=1 << 12)
def _on_gpu(kernel: str, index: int, rows: int, precision: str | None, places: tuple) -> Config:
    """Looked up once: every launch asks."""
    name, arch, _, limit = _device(index)
    table = tuned(table_path(), name)
    config = table.get(key(kernel, precision)) or shipped(arch, kernel, precision)
    return fitted(config, limit).for_rows(rows)


def forget() -> None:
    """Let the next launch read the table again."""
    tuned.cache_clear()
    _on_gpu.cache_clear()


def shipped(arch: str, kernel: str, precision: str | None) -> Config:
    """The shipped configuration, the precision's own where it has one."""
    table = SHIPPED[arch]
    return table.get(key(kernel, precision)) or table[kernel]


def fitted(config: Config, shared_limit: int) -> Config:
    """The configuration with as many stages as the chip's shared memory allows."""
    while config.problem(shared_limit) and isinstance(config, ProductConfig) and config.stages > 1:
        config = dataclasses.replace(config, stages=config.stages - 1)
    problem = config.problem(shared_limit)
    if problem:
        raise ValueError(f"Kernel configuration {config} doesn't fit this GPU: {problem}.")
    return config
