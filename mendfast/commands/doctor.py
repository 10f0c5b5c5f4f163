"""``mendfast doctor``: what is here, which backend serves each op and why, and one real edit."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .. import backends, ops
from ..build_info import build_info
from ..ops import few_rows
from .console import make_console, plain, text

PACKAGES = ("mendfast", "torch", "triton", "transformers", "safetensors", "datasets", "accelerate")


INSTRUCTIONS = {None: "", "avx2": "AVX2", "avx512": "AVX-512"}


@dataclass(kw_only=True)
class DoctorSettings:
    """Nothing."""


def doctor(settings: DoctorSettings) -> dict[str, Any]:
    """What the command does."""
    return examine(make_console())


def examine(console: Console) -> dict[str, Any]:
    """Print the findings and return them; "works" says whether the edit changed the model and came out again."""
    assert ops  # its import registers the backends
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    versions = {name: _version(name) for name in PACKAGES}
    findings: dict[str, Any] = {
        "python": platform.python_version(),
        "versions": versions,
        "device": device_name(device),
        "extension": build_info(),
        "cpu_extension": build_info("cpu") | _served(),
        "ops": backends.explain(device),
    }
    console.print(f"Python {findings['python']}, " + ", ".join(f"{k} {v}" for k, v in versions.items()))
    console.print(f"Device: {findings['device']}")
    built = findings["extension"]
    targets = ", ".join(built["targets"]) if built["built"] else ""
    console.print(
        text(
            f"CUDA extension: built by nvcc {built['nvcc']} for {targets}"
            if built["built"]
            else f"CUDA extension: left out, {built['reason']}"
        )
    )
    problem = findings["cpu_extension"]["problem"]
    widest = INSTRUCTIONS[findings["cpu_extension"]["instructions"]]
    console.print(text("CPU extension: " + (f"can't serve, {problem}" if problem else f"built, runs by {widest}")))
    table = Table(title=f"Backends on {device}")
    for column in ("op", "backend", "better ones, and why they were left"):
        table.add_column(column)
    for row in findings["ops"]:
        table.add_row(row["op"], row["backend"], plain(row["left"]))
    console.print(table)
    findings |= _one_edit(device)
    mark = "[green]✓[/]" if findings["works"] else "[red]✗[/]"
    console.print(
        f"{mark} one edit of a random 4-block GPT-2: {findings['edit_ms']:.1f} ms, applied and taken out again"
    )
    return findings


def _served() -> dict[str, str | None]:
    problem = few_rows.problem()
    return {"problem": problem, "instructions": None if problem else few_rows.instructions()}


def cpu_name() -> str:
    """The processor's name as Linux gives it, elsewhere Python's."""
    information = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", information.read_text()) if information.is_file() else None
    return named[1].strip() if named else platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """What computes: "cuda: NVIDIA H100", "cpu: AMD EPYC, 2 threads"."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return f"{device.type}: {cpu_name()}, {torch.get_num_threads()} threads"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _one_edit(device: torch.device) -> dict[str, Any]:
    from ..base_model import small_gpt2
    from ..config import MendConfig
    from ..editor import MendEditor

    torch.manual_seed(0)
    model = small_gpt2(64, width=64, depth=4, heads=4).to(device).eval()
    editor = MendEditor.from_model(model, None, MendConfig(rank=16, step_size=1e-2))
    ids = torch.randint(0, 64, (1, 12))
    labels = ids.clone()
    labels[:, :-3] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    editor.train().edit_tokens(batch)  # its statistics
    editor.eval()
    started = time.perf_counter()
    edit = editor.edit_tokens(batch)
    seconds = time.perf_counter() - started
    before = [layer.weight.clone() for layer in editor.layers]
    edit.apply_(model)
    changed = all(not torch.equal(w, layer.weight) for w, layer in zip(before, editor.layers, strict=True))
    edit.revert_(model)
    restored = all(torch.equal(w, layer.weight) for w, layer in zip(before, editor.layers, strict=True))
    return {"works": changed and restored, "edit_ms": seconds * 1e3}
