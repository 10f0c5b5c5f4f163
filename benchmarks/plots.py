"""The plots of one result file, as PNGs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .readings import OURS, PLOTS, identity, opponents, seconds


def draw(result: dict, folder: Path) -> list[Path]:
    """Write ``<device>-<plot>.png`` for every plot of the report; returns the paths."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for stem, title in PLOTS.items():
        figure = Figure(figsize=(8, 5), layout="constrained")
        axis = figure.subplots()
        _DRAW[stem](axis, result)
        axis.set_title(f"{title}\n{result['machine']['name']}", fontsize=10)
        axis.grid(alpha=0.3)
        path = folder / f"{result['machine']['device']}-{stem}.png"
        figure.savefig(path, dpi=90, metadata={"Software": None})
        paths.append(path)
    return paths


def _short(row: dict) -> str:
    return identity(row).replace(" | ", ", ").replace(", float32", "")


def _speedup(axis, result: dict) -> None:
    """Against naive where it raced, else against the fastest opponent: the hardest of them."""
    bars = []
    for row in result["rows"]:
        ratios = opponents(row)
        if ratios:
            name = "naive" if "naive" in ratios else min(ratios, key=ratios.get)
            bars.append((f"{_short(row)} / {name}", ratios[name]))
    bars.sort(key=lambda bar: bar[1])
    colours = ["tab:green" if ratio >= 1 else "tab:red" for _, ratio in bars]
    axis.barh([label for label, _ in bars], [ratio for _, ratio in bars], color=colours)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xscale("log")
    axis.tick_params(axis="y", labelsize=5)
    axis.set_xlabel("× (above 1 mendfast is faster)")


def _roofline(axis, result: dict) -> None:
    rates = result["machine"]["ceilings"]
    rows = [row for row in result["rows"] if "floor_s" in row]
    for question in dict.fromkeys(row["question"] for row in rows):
        points = [
            (row["operations"] / row["bytes"], row["operations"] / seconds(row) / 1e9)
            for row in rows
            if row["question"] == question
        ]
        axis.loglog(*zip(*points, strict=True), "o", markersize=4, label=question)
    intensities = [row["operations"] / row["bytes"] for row in rows]
    ends = [min(intensities, default=0.1) / 2, max(intensities, default=100) * 2]
    for name, rate in rates.items():
        if name != "bytes":
            knee = rate / rates["bytes"]
            line = sorted({ends[0], min(max(knee, ends[0]), ends[1]), ends[1]})
            axis.loglog(line, [min(rate, x * rates["bytes"]) / 1e9 for x in line], "k-", linewidth=1)
            axis.annotate(name, (ends[1], rate / 1e9), fontsize=7, ha="right", va="bottom")
    axis.set(xlabel="operations per byte", ylabel="Gflop/s")
    axis.legend(fontsize=6)


def _memory(axis, result: dict) -> None:
    rows = [row for row in result["rows"] if "peak_bytes" in row["contestants"].get("naive", {})]
    for offset, name in ((0.2, OURS), (-0.2, "naive")):
        places = [i + offset for i in range(len(rows))]
        axis.barh(places, [row["contestants"][name]["peak_bytes"] / 1e6 for row in rows], 0.4, label=name)
    axis.set_yticks(range(len(rows)), [_short(row) for row in rows], fontsize=7)
    axis.set_xlabel("MB that PyTorch allocates above the start of the call")
    axis.legend()


def _lines(question: str, value: Callable[[dict, float], float], ylabel: str) -> Callable:
    def draw_lines(axis, result: dict) -> None:
        rows = [row for row in result["rows"] if row["question"] == question]
        shapes = [s for s in dict.fromkeys(r["shape"] for r in rows) if sum(r["shape"] == s for r in rows) > 1]
        for shape in shapes:
            for name, style in ((OURS, "o-"), ("one at a time", "s:"), ("naive", "x--")):
                points = sorted(
                    (row["units"], value(row, row["contestants"][name]["median_s"]))
                    for row in rows
                    if row["shape"] == shape and "median_s" in row["contestants"].get(name, {})
                )
                if points:
                    axis.plot(*zip(*points, strict=True), style, label=f"{shape}, {name}")
        axis.set(xlabel="edits", ylabel=ylabel, xscale="log", yscale="log")
        if shapes:
            axis.legend(fontsize=8)

    return draw_lines


_DRAW = {
    "speedup": _speedup,
    "roofline": _roofline,
    "memory": _memory,
    "edits": _lines("edit, end to end", lambda row, s: row["units"] / s, "edits per second"),
    "steps": _lines("meta step", lambda row, s: s, "seconds per step"),
}
