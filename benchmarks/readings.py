"""Rows of the result files, and what is read off them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
OURS = "mendfast"
BOUNDS = ("bare pass", "unedited", "applied", "its dependencies", "safetensors alone")
"""Contestants that do less than is asked: what a row can at best be, and no opponents."""
_FIGURES = (
    "test", "question", "shape", "device", "units", "contestants", "bytes", "operations", "floor_s", "times_floor",
    "floor_dtype", "backend",
)  # fmt: skip
PLOTS = {
    "speedup": "How many times as long the opponents take",
    "roofline": "Operations per second against operations per byte, and the measured ceilings",
    "memory": "Peak memory",
    "edits": "Edits per second against the number of edits",
    "steps": "Time of a meta-training step against its edits",
}


def load(path: str | Path) -> dict:
    """A result file; a ValueError for anything else."""
    try:
        result = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}.") from error
    if not isinstance(result, dict) or result.get("format") != "mendfast.benchmarks":
        raise ValueError(f"{path} is no result of `python -m benchmarks.run`.")
    return result


def latest(folder: Path = HERE / "results") -> list[dict]:
    """The newest result of each machine, GPUs first."""
    newest: dict[tuple, dict] = {}
    for result in sorted((load(path) for path in folder.glob("*.json")), key=lambda r: r["machine"]["date"]):
        machine = result["machine"]
        newest[machine["device"], machine["name"], machine["threads"]] = result
    return sorted(newest.values(), key=lambda r: (r["machine"]["device"] != "cuda", r["machine"]["name"]))


def size_of(row: dict) -> str:
    """What tells the row from its question's others, but for the shape."""
    return ", ".join(
        value if isinstance(value, str) else f"{value:,} {key.removesuffix('s') if value == 1 else key}"
        for key, value in row.items()
        if key not in _FIGURES
    )


def identity(row: dict) -> str:
    return f"{row['question']} | {row['shape']} | {size_of(row)}"


def seconds(row: dict, name: str = OURS) -> float:
    return row["contestants"][name]["median_s"]


def opponents(row: dict) -> dict[str, float]:
    """Opponent -> how many times as long it takes; above 1 mendfast is faster."""
    return {
        name: figures["median_s"] / seconds(row)
        for name, figures in row["contestants"].items()
        if name not in (OURS, *BOUNDS) and "median_s" in figures
    }


def losses(rows: Iterable[dict]) -> list[tuple[dict, str, float]]:
    """(row, its fastest opponent, ratio) where that opponent's median lies below mendfast's, however little."""
    found = []
    for row in rows:
        ratios = opponents(row)
        name = min(ratios, key=ratios.get, default=None)
        if name is not None and ratios[name] < 1:
            found.append((row, name, ratios[name]))
    return found
