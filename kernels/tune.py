"""Time the valid configurations of every kernel on the GPU at hand, and write the table that launchers read.

    python -m mendfast.kernels.tune                       # every kernel, at the shapes of GPT-J
    python -m mendfast.kernels.tune --kernel project --precision tf32x3

A table holds the fastest configuration per GPU model, kernel and precision. The precision is the caller's: each is
tuned by itself, and none is ever chosen here. Tables of other GPU models in the same file are kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ..types import PRECISIONS
from . import configs
from .configs import Config, ProductConfig, SweepConfig

PRODUCTS = ("project", "block_fwd", "expand", "outer")
SWEEPS = ("gate_bwd", "pointwise_fwd", "normalise", "running_stats", "vocabulary_fwd", "vocabulary_bwd")
MODES, LOGITS = 3, (1, 200, 50257)


def candidates(kernel: str, shared_limit: int) -> Iterator[Config]:
    """Every valid configuration that is worth a try."""
    if kernel in PRODUCTS:
        sides = ((64, 128), (32, 64), (16, 32, 64), (4, 8), (2, 3, 4), (1, 2))
        found = (ProductConfig(*values) for values in itertools.product(*sides))
    else:
        rows = (1,) if kernel.startswith("vocabulary") else (4, 8, 16, 32)
        columns = (1024, 2048, 4096, 8192) if kernel.startswith("vocabulary") else (64, 128, 256, 512)
        found = (SweepConfig(*values) for values in itertools.product(rows, columns, (2, 4, 8), (2, 4, 8)))
    return (config for config in found if config.problem(shared_limit) is None)


def workload(
    kernel: str, precision: str, m: int, n: int, rank: int, rows: int, device: torch.device
) -> Callable[[], object]:
    """A call whose time is dominated by ``kernel``: its launcher, at this shape."""
    from ..types import EPS, Block
    from . import _products, editor_mlp, kl_divergence, running_stats

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device)

    width = m + n
    u, delta, t, x = rand(rows, m), rand(rows, n), rand(rows, rank), rand(rows, width)
    stats = [rand(m), rand(m).abs(), rand(n), rand(n).abs()]
    mode = torch.arange(rows, device=device) * MODES // rows
    if kernel == "project":
        weight = rand(rank, width)
        return lambda: _products.project([u, delta], weight, stats, EPS, precision)
    if kernel == "expand":
        weight, out = rand(width, rank), torch.empty_like(x)
        return lambda: _products.expand(t, weight, x, out, precision)
    if kernel == "outer":
        out = torch.empty(width, rank, device=device)
        return lambda: _products.outer([u, delta], t, stats, EPS, out, precision)
    if kernel in ("block_fwd", "pointwise_fwd"):
        weights = (rand(width, rank), rand(rank, width)) if kernel == "block_fwd" else (rand(1, 1), rand(1, 1))
        block = Block(*weights, rand(width), rand(MODES, width), rand(MODES, width))
        out, w = (torch.empty_like(u), torch.empty_like(delta)), torch.empty_like(x)
        by_library = kernel == "pointwise_fwd"
        return lambda: editor_mlp._block_fwd(
            block, t=t, mode=mode, x=(u, delta), stats=stats, out=out, w=w,
            residual=True, keep=True, precision=precision, by_library=by_library,
        )  # fmt: skip
    if kernel == "gate_bwd":
        block = Block(None, None, None, rand(MODES, width), rand(MODES, width))
        d_w, full = torch.empty_like(x), torch.empty_like(x)
        return lambda: editor_mlp._gate(block, g=(u, delta), w=x, mode=mode, d_w=d_w, full=full, store=True)
    if kernel == "normalise":
        out = (torch.empty_like(u), torch.empty_like(delta))
        return lambda: editor_mlp.normalise(u, delta, stats, out)
    if kernel == "running_stats":
        count, mean, m2 = torch.zeros(1, device=device), torch.zeros(n, device=device), torch.zeros(n, device=device)
        return lambda: running_stats.running_stats_(count, mean, m2, delta, None)
    p, q = rand(*LOGITS), rand(*LOGITS)
    keep = torch.ones(LOGITS[:2], dtype=torch.bool, device=device)
    if kernel == "vocabulary_fwd":
        return lambda: kl_divergence.forward(p, q, keep)
    _, lse_p, lse_q = kl_divergence.forward(p, q, keep)
    grad = rand(*LOGITS[:2])
    return lambda: kl_divergence.backward(grad, p, q, keep, lse_p, lse_q)


def best(
    kernel: str, call: Callable[[], object], shared_limit: int, seconds: float = math.inf
) -> tuple[Config, float]:
    """(fastest configuration, its median milliseconds); those that fail to compile or launch are passed over.

    In an order that mixes them, for at least ``seconds`` where that is not all of them.
    """
    import triton

    times: list[tuple[float, Config]] = []
    found, end = list(candidates(kernel, shared_limit)), time.monotonic() + seconds
    for config in random.Random(0).sample(found, len(found)):
        if times and time.monotonic() > end:
            break
        with configs.force(kernel, config):
            try:
                times.append((triton.testing.do_bench(call, return_mode="median"), config))
            except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError) as error:
                print(f"  {config}: {type(error).__name__}", file=sys.stderr)
    if not times:
        raise RuntimeError(f"No configuration of {kernel} could be launched on this GPU.")
    elapsed, config = min(times, key=lambda pair: pair[0])
    return config, elapsed


def write(path: Path, device_name: str, entries: dict[str, Config]) -> None:
    """Merge entries into the table, replacing the file whole."""
    table = json.loads(path.read_text()) if path.is_file() else {"devices": {}}
    own = table["devices"].setdefault(device_name, {})
    own |= {name: dataclasses.asdict(config) for name, config in entries.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(table, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)
    configs.forget()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mendfast.kernels.tune",
        description="Time kernel configurations on this GPU and write the table that the launchers read.",
        epilog="Example: python -m mendfast.kernels.tune --kernel project --precision tf32x3",
    )
    parser.add_argument("--kernel", action="append", choices=PRODUCTS + SWEEPS, help="only this; repeatable")
    parser.add_argument("--precision", action="append", choices=PRECISIONS, help="only this; repeatable")
    parser.add_argument("--m", type=int, default=4096, help="width of u (default: GPT-J)")
    parser.add_argument("--n", type=int, default=16384, help="width of delta")
    parser.add_argument("--rank", type=int, default=1920)
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=math.inf, help="for each kernel (default: all there are)")
    parser.add_argument("--output", type=Path, metavar="FILE", help=f"the table (default {configs.table_path()})")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(
            "Tuning times kernels on a GPU, and PyTorch sees none here. The launchers use the shipped "
            "configurations; `python -m mendfast.kernels.aot --arch sm_90` shows what those take.",
            file=sys.stderr,
        )
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    name, _, _, limit = configs._device(device.index)
    path = args.output or configs.table_path()
    for kernel in args.kernel or PRODUCTS + SWEEPS:
        for precision in (args.precision or PRECISIONS) if kernel in PRODUCTS else (None,):
            shape = (args.m, args.n, args.rank, args.rows)
            call = workload(kernel, precision or "tf32x3", *shape, device)
            config, elapsed = best(kernel, call, limit, args.seconds)
            print(f"{configs.key(kernel, precision):24}{elapsed * 1e3:9.1f} us  {config}", flush=True)
            write(path, name, {configs.key(kernel, precision): config})
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
