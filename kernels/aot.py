"""Compile every kernel, as its launcher would launch it, for GPUs that this machine may not have.

    python -m mendfast.kernels.aot --arch sm_90 --json table.json

The launchers run on tensors without memory at the shapes of GPT-J (D = 4,096 + 16,384, R = 1,920, 60 rows; logits
200 x 50,257). What they hand to Triton is recorded, compiled to machine code with the same specialisations, and put
into a table: registers, spilled bytes, stack, shared memory, and the bytes and operations that one launch can't do
without. Nothing is run, so the table holds no times.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..types import Block
from . import configs

WIDTHS, RANK, ROWS, MODES = (4096, 16384), 1920, 60, 3
LOGITS = (1, 200, 50257)
CASES = ("float32/tf32x3", "float32/tf32", "bfloat16/tf32x3", "bfloat16/tf32")
"""What the matrix kernels are compiled for: dtype of parameters and rows / precision."""
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}


@dataclass
class Launch:
    """One recorded launch: the kernel, its named arguments, its grid and its options."""

    kernel: triton.JITFunction
    args: dict
    grid: tuple
    options: dict

    def source(self) -> ASTSource:
        """The kernel specialised as Triton's launcher does: ones, multiples of 16, 32- or 64-bit integers."""
        signature, constants, attributes = {}, {}, {}
        for i, param in enumerate(self.kernel.params):
            value = self.args[param.name]
            if param.is_constexpr or value is None or type(value) is int and value == 1:
                signature[param.name], constants[param.name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[param.name] = "*" + _TYPES[value.dtype]
                attributes[(i,)] = [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[param.name] = "fp32"
            elif isinstance(value, int):
                signature[param.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0:
                    attributes[(i,)] = [["tt.divisibility", 16]]
            else:
                raise TypeError(f"{self.name}: argument {param.name} is a {type(value).__name__}.")
        return ASTSource(self.kernel, signature, constants, attributes)

    @property
    def name(self) -> str:
        return self.kernel.__name__.removeprefix("_").removesuffix("_kernel")

    @property
    def blocks(self) -> dict[str, int]:
        return {key: value for key, value in self.args.items() if key.startswith("BLOCK")} | self.options

    def identity(self) -> tuple:
        source = self.source()
        return (self.name, *(tuple(sorted(d.items(), key=str)) for d in (source.signature, source.constants)),
                tuple(self.options.items()))  # fmt: skip


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collects launches within the block, and launches none."""
    launches: list[Launch] = []
    original = triton.JITFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        names = [param.name for param in self.params]
        bound = dict(zip(names, args, strict=False))
        bound |= {key: kwargs.pop(key) for key in list(kwargs) if key in names}
        launches.append(Launch(self, bound, grid, kwargs))

    triton.JITFunction.run = run
    try:
        yield launches
    finally:
        triton.JITFunction.run = original


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _editor(dtype: torch.dtype, precision: str) -> None:
    from . import editor_mlp

    width, rows = sum(WIDTHS), min(ROWS, editor_mlp.LIBRARY_ROWS[precision])
    u, delta = (_meta(rows, side, dtype=dtype) for side in WIDTHS)
    stats = [_meta(side) for side in WIDTHS for _ in range(2)]
    block = Block(
        _meta(width, RANK, dtype=dtype),
        _meta(RANK, width, dtype=dtype),
        *(_meta(*shape, dtype=dtype) for shape in ((width,), (MODES, width), (MODES, width))),
    )
    mode = _meta(rows, dtype=torch.int64)
    options = {"precision": precision, "residual": True}
    _, _, *saved = editor_mlp.forward(u, delta, stats, [block] * 2, mode, keep=True, **options)
    editor_mlp.backward((u, delta), (u, delta), stats, [block] * 2, saved, mode, needs_rows=False, **options)
    many = editor_mlp.LIBRARY_ROWS[precision] + 1
    u, delta = (_meta(many, side, dtype=dtype) for side in WIDTHS)
    mode = _meta(many, dtype=torch.int64)
    editor_mlp.forward(u, delta, stats, [block] * 2, mode, keep=True, **options)


def _lowrank(dtype: torch.dtype) -> None:
    from . import lowrank_linear

    y, x = _meta(4, 128, WIDTHS[1], dtype=dtype), _meta(4, 128, WIDTHS[0], dtype=dtype)
    u, delta, alpha = _meta(4, 20, WIDTHS[0]), _meta(4, 20, WIDTHS[1]), _meta(1)
    _, c = lowrank_linear.forward(y, x, u, delta, alpha=alpha, scale=1.0)
    needs = lowrank_linear.Needs(True, True, True, True)
    lowrank_linear.backward(y, x, u, delta, c, alpha=alpha, scale=1.0, needs=needs)


def _update(dtype: torch.dtype) -> None:
    from . import rank1_update

    weight, (left, right) = _meta(*WIDTHS, dtype=dtype), (_meta(ROWS, side) for side in WIDTHS)
    rank1_update.rank1_update_(weight, left, right, 1.0)
    rank1_update.rank1_update_(weight, left, right, 1.0, stochastic=True, seed=7)


def _rest(dtype: torch.dtype) -> None:
    from . import kl_divergence, running_stats, token_nll

    mask = _meta(ROWS, dtype=torch.bool)
    mean = _meta(WIDTHS[1])
    running_stats.running_stats_(_meta(1), mean, mean, _meta(ROWS, WIDTHS[1], dtype=dtype), mask)
    logits, keep = _meta(*LOGITS, dtype=dtype), _meta(*LOGITS[:2], dtype=torch.bool)
    labels, grad = _meta(*LOGITS[:2], dtype=torch.int64), _meta(*LOGITS[:2])
    token_nll.forward(logits, labels)
    token_nll.backward(grad, logits, labels, grad)
    kl_divergence.forward(logits, logits, keep)
    kl_divergence.backward(grad, logits, logits, keep, grad, grad)


def launches(arch: str, cases: tuple[str, ...] = CASES) -> list[tuple[str, Launch]]:
    """(case, launch) of every kernel that the ops launch at the shapes above, without repetitions."""
    found, seen = [], set()

    def collect(case: str, function: Callable, *args) -> None:
        with configs.pretend(arch), recording() as recorded:
            function(*args)
        for launch in recorded:
            if launch.identity() not in seen:
                seen.add(launch.identity())
                found.append((case, launch))

    for case in cases:
        dtype_name, precision = case.split("/")
        collect(case, _editor, getattr(torch, dtype_name), precision)
    for dtype_name in dict.fromkeys(case.split("/")[0] for case in cases):
        collect(dtype_name + "/tf32x3", _lowrank, getattr(torch, dtype_name))
        collect(dtype_name + "/tf32x3", _update, getattr(torch, dtype_name))
        collect(dtype_name, _rest, getattr(torch, dtype_name))
    return found


@functools.cache
def _ptxas(arch: str) -> str:
    """Triton's own assembler for the architecture."""
    from triton.backends.nvidia.compiler import get_ptxas

    for args in ((int(arch.removeprefix("sm_")),), ()):
        with contextlib.suppress(TypeError):
            tool = get_ptxas(*args)
            return getattr(tool, "path", None) or tool[0]
    raise RuntimeError("Triton's ptxas was not found; this version of Triton is unknown to mendfast.kernels.aot.")


def _resources(ptx: str, arch: str) -> dict[str, int]:
    """Registers, stack and spilled bytes, from ``ptxas -v``."""
    target = re.search(r"^\.target\s+(\w+)", ptx, re.M)[1]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [_ptxas(arch), "-v", f"--gpu-name={target}", str(source), "-o", str(source.with_suffix(".cubin"))]
        done = subprocess.run(command, capture_output=True, text=True)
    text = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"ptxas failed for {target}: {text}")
    spill = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
    stack, stores, loads = (int(n) for n in spill.groups())
    registers = int(re.search(r"Used (\d+) registers", text)[1])
    return {"registers": registers, "stack": stack, "spill_stores": stores, "spill_loads": loads}


def _matrix_unit(ptx: str) -> str:
    for name, mark in (("wgmma", "wgmma.mma_async"), ("tcgen05", "tcgen05.mma"), ("mma", "mma.sync")):
        if mark in ptx:
            return name
    return "fma"


def work(launch: Launch) -> tuple[int, int]:
    """(bytes, operations) that one launch can't do without: each input read once, each output written once."""
    a = launch.args

    def size(name: str) -> int:
        return a[name].element_size()

    if launch.name in ("project", "expand", "outer"):
        batches = launch.grid[1] if launch.name == "expand" else launch.grid[2]
        wide = a["n_out"] if launch.name == "expand" else a["width0"] + a["width1"]
        rank, rows = a["n_out"] if launch.name == "project" else a["n_rank"], a["n_rows"]
        operations = 2 * batches * rows * rank * wide
        if launch.name == "project":
            splits = launch.grid[1]
            moved = rank * wide * size("weight_ptr") + rows * (wide * size("x0_ptr") + splits * rank * 4)
        elif launch.name == "expand":
            moved = rank * wide * size("weight_ptr") + rows * (rank * 4 + wide * size("out_ptr"))
            moved += rows * wide * size("residual_ptr") if a["HAS_RESIDUAL"] else 0
        else:
            moved = rank * wide * size("out_ptr") + rows * (rank * 4 + wide * size("x0_ptr"))
        return batches * moved, operations
    if launch.name == "sum_splits":
        return 4 * a["numel"] * (a["splits"] + 1), a["numel"] * a["splits"]
    if launch.name == "editor_block_fwd":
        wide, rank, rows = a["width0"] + a["width1"], a["n_rank"], a["n_rows"]
        vectors = wide * size("b_ptr") + MODES * wide * (size("s_ptr") + size("o_ptr"))
        moved = vectors + rows * wide * (size("x0_ptr") + size("out0_ptr") + 4)
        if a["MATMUL"]:
            return moved + rank * wide * size("weight_ptr") + rows * rank * 4, 2 * rows * rank * wide
        return moved + rows * wide * 4, 6 * rows * wide
    if launch.name == "editor_gate_bwd":
        wide, rows = a["width0"] + a["width1"], a["n_rows"]
        stored = 8 if a["STORE_G"] else 4
        return wide * (rows * (size("g0_ptr") + 4 + stored) + 4 * 4 * MODES), 8 * rows * wide
    if launch.name == "editor_normalise":
        return a["n_rows"] * a["width"] * (size("x_ptr") + size("out_ptr")), 2 * a["n_rows"] * a["width"]
    if launch.name == "running_stats_chunk":
        parts = launch.grid[1] * a["width"] * 8
        return a["n_rows"] * a["width"] * size("rows_ptr") + parts, 6 * a["n_rows"] * a["width"]
    if launch.name == "running_stats_merge":
        return a["width"] * (8 * a["splits"] + 16), 10 * a["width"] * (a["splits"] + 1)
    if launch.name == "rank1_update":
        elements, factors = a["rows"] * a["cols"], a["terms"] * (a["rows"] + a["cols"])
        return 2 * elements * size("weight_ptr") + factors * size("left_ptr"), 2 * a["terms"] * elements
    rows = math.prod(LOGITS[:2])
    if launch.name.endswith("_sum"):
        return rows * (20 * a["splits"] + 12), 20 * rows * a["splits"]
    per_token = {"token_nll_fwd": (1, 4), "token_nll_bwd": (2, 4), "kl_divergence_fwd": (2, 10),
                 "kl_divergence_bwd": (3, 6)}[launch.name]  # fmt: skip
    dtype = a["logits_ptr" if "logits_ptr" in a else "q_ptr"].element_size()
    return rows * LOGITS[2] * per_token[0] * dtype, rows * LOGITS[2] * per_token[1]


def compile_launch(case: str, launch: Launch, arch: str) -> dict:
    """The row of the table for one launch."""
    started = time.perf_counter()
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    compiled = triton.compile(launch.source(), target=target, options=launch.options)
    ptx = compiled.asm["ptx"]
    moved, operations = work(launch)
    return {
        "kernel": launch.name,
        "case": case,
        "arch": arch,
        "configuration": launch.blocks,
        "grid": list(launch.grid),
        **_resources(ptx, arch),
        "shared": compiled.metadata.shared,
        "shared_limit": configs.SHARED_LIMIT[arch],
        "matrix_unit": _matrix_unit(ptx) if "PRECISION" in launch.args else None,
        "bytes": moved,
        "operations": operations,
        "compile_seconds": round(time.perf_counter() - started, 2),
    }


def problems(row: dict) -> list[str]:
    """What is wrong with a compiled kernel; empty if nothing is."""
    found = []
    if row["spill_stores"] or row["spill_loads"]:
        found.append(f"{row['spill_stores']} bytes of registers spilled")
    if row["stack"]:
        found.append(f"{row['stack']} bytes of stack")
    if row["shared"] > row["shared_limit"]:
        found.append(f"{row['shared']} bytes of shared memory; the limit is {row['shared_limit']}")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mendfast.kernels.aot",
        description="Compile every Triton kernel for an architecture and say what it takes. Needs no GPU.",
        epilog="Example: python -m mendfast.kernels.aot --arch sm_90 --json sm_90.json",
    )
    parser.add_argument("--arch", choices=configs.ARCHS, default="sm_90", help="the generation (default sm_90)")
    parser.add_argument("--case", action="append", choices=CASES, help="only this dtype/precision; repeatable")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there")
    args = parser.parse_args(argv)
    rows, bad = [], 0
    print(f"{'kernel':24}{'case':18}{'regs':>5}{'spill':>6}{'stack':>6}{'shared':>8}  {'unit':8}{'MB':>8}{'Gop':>8}")
    for case, launch in launches(args.arch, tuple(args.case or CASES)):
        row = compile_launch(case, launch, args.arch)
        rows.append(row)
        print(
            f"{row['kernel']:24}{case:18}{row['registers']:5}{row['spill_stores'] + row['spill_loads']:6}"
            f"{row['stack']:6}{row['shared']:8}  {row['matrix_unit'] or '-':8}{row['bytes'] / 1e6:8.1f}"
            f"{row['operations'] / 1e9:8.2f}" + "".join(f"  {p}" for p in problems(row)),
            flush=True,
        )
        bad += bool(problems(row))
    if args.json:
        table = {
            "arch": args.arch,
            "triton": triton.__version__,
            "torch": torch.__version__,
            "shapes": {"m": WIDTHS[0], "n": WIDTHS[1], "R": RANK, "N": ROWS, "modes": MODES, "logits": LOGITS},
            "measured": "nothing was run: compiled ahead of time",
            "rows": rows,
        }
        args.json.write_text(json.dumps(table, indent=1) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
