"""Pictures of what ``mendfast eval`` measured."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from .eval_report import COLUMNS, MANY, columns, drawdown_of, number


class Point(NamedTuple):
    """A system between success and locality."""

    key: str
    name: str
    x: float
    y: float
    seconds: float
    best: bool
    """Whether none is better in one and at least as good in the other."""


class Pareto(NamedTuple):
    """The systems of one number of edits."""

    k: int
    x: str
    y: str
    points: list[Point]

    @property
    def frontier(self) -> list[Point]:
        """The best, from left to right."""
        return sorted((point for point in self.points if point.best), key=lambda p: (p.x, -p.y))


def paretos(result: dict[str, Any]) -> list[Pareto]:
    """Success against locality, by the number of edits; of generated answers where there are any."""
    found = []
    for k in sorted({row["k"] for row in result["rows"]}):
        rows = [row for row in result["rows"] if row["k"] == k and row["figures"]]
        spoken = all({"exact_match", "unchanged"} <= row["figures"].keys() for row in rows)
        y = "exact match, of edits and rephrasings" if spoken else "edit success"
        x = "unrelated answers unchanged" if spoken else "1 - drawdown"
        placed = []
        for row in rows:
            means = {name: figure["mean"] for name, figure in row["figures"].items()}
            if spoken:
                exact = [means[name] for name in ("exact_match", "rephrase_exact_match") if name in means]
                place = means["unchanged"], sum(exact) / len(exact)
            elif "edit_success" in means and "drawdown" in means:
                place = 1 - means["drawdown"], means["edit_success"]
            else:
                continue
            placed.append((row, *place, means.get("seconds", 0.0)))
        points = [
            Point(row["system"], row["name"], a, b, seconds,
                  not any(c >= a and d >= b and (c > a or d > b) for _, c, d, _ in placed))
            for row, a, b, seconds in placed
        ]  # fmt: skip
        if points:
            found.append(Pareto(k, x, y, points))
    return found


def radius(point: Point, points: Sequence[Point], least: float = 4.0, most: float = 14.0) -> float:
    """Of a system's dot: its area above the least grows with the seconds that an edit takes."""
    longest = max(other.seconds for other in points)
    return least + (most - least) * math.sqrt(point.seconds / longest) if longest else least


def pareto_png(result: dict[str, Any]) -> bytes | None:
    """The same as a picture, a panel for each number of edits; None where nothing can be placed."""
    from matplotlib.figure import Figure

    found = paretos(result)
    if not found:
        return None
    figure = Figure(figsize=(5.2 * len(found), 4.4), layout="constrained")
    for axis, one in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        frontier = one.frontier
        axis.plot([p.x for p in frontier], [p.y for p in frontier], color="tab:blue", alpha=0.4, linewidth=1)
        for point in one.points:
            size = radius(point, one.points) ** 2
            color = "tab:blue" if point.best else "tab:gray"
            axis.scatter([point.x], [point.y], s=size, color=color, alpha=0.8, zorder=3)
        for point, (dx, dy) in zip(one.points, apart([(p.x, p.y) for p in one.points]), strict=True):
            axis.annotate(point.name, (point.x, point.y), (8 + dx, dy), textcoords="offset points", fontsize="small",
                          va="center")  # fmt: skip
        axis.set(xlabel=one.x, ylabel=one.y, xlim=(-0.03, 1.2), ylim=(-0.05, 1.08))
        axis.set_xticks([0, 0.25, 0.5, 0.75, 1])
        many = MANY.get(result["table"])
        axis.set_title(f"{one.k:,} {many}; size: time" if many else "size: time of an edit", fontsize="medium")
        axis.grid(alpha=0.3)
    return _png(figure)


def apart(places: Sequence[tuple[float, float]], near: float = 0.05, step: float = 11.0) -> list[tuple[float, float]]:
    """How far each label is moved, in points, so that those of places close together don't cover each other."""
    moved = [(0.0, 0.0)] * len(places)
    order = sorted(range(len(places)), key=lambda i: (-places[i][1], places[i][0]))
    taken: list[tuple[float, float]] = []
    for i in order:
        x, y = places[i]
        shift = 0
        while any(abs(x - a) < 0.3 and abs(y - shift * near - b) < near * 0.9 for a, b in taken):
            shift += 1
        taken.append((x, y - shift * near))
        moved[i] = (0.0, -shift * step)
    return moved


def plot(result: dict[str, Any]) -> bytes:
    """Edit success, generality and drawdown, with intervals: bars by system, or lines by the number of edits; of edits
    in turn also running text's perplexity and how old edits fare."""
    from matplotlib.figure import Figure

    many, in_turn = MANY.get(result["table"]), result["table"] == "sequential"
    wanted = ["edit_success", "generality", drawdown_of(result)]
    wanted = ["efficacy", drawdown_of(result), "perplexity_rise"] if in_turn else wanted
    names = [name for name in wanted if name in columns(result)]
    systems = list(dict.fromkeys(row["name"] for row in result["rows"]))
    count = len(names) + in_turn
    figure = Figure(figsize=(3.7 * count, 3.6 if many else 1.4 + 0.32 * len(systems)), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False, sharey=not many)[0]
    for axis, name in zip(panels, names, strict=False):
        (_lines if many else _bars)(axis, result["rows"], systems, name)
        axis.set_title(COLUMNS[name].title)
        axis.grid(alpha=0.3, axis="both" if many else "x")
        if many:
            axis.set_xlabel(f"edits {many}")
        if many and name in ("edit_success", "efficacy", "generality"):
            axis.set_ylim(-0.03, 1.03)
        elif name in ("edit_success", "generality"):
            axis.set_xlim(0, 1.03)
        elif name == "perplexity_rise":
            axis.set_yscale("symlog")
    if in_turn:
        _ages(panels[-1], result["rows"], systems)
    if many:
        panels[0].legend(fontsize="small" if len(systems) > 5 else None)
    return _png(figure)


def _png(figure: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    return stream.getvalue()


def _ages(axis: Any, rows: Sequence[dict[str, Any]], systems: list[str]) -> None:
    """How old edits fare at the end of each system's longest sequence."""
    longest = {row["name"]: row for row in sorted(rows, key=lambda row: row["k"]) if row.get("survival")}
    ages = sorted({(part["from"], part["to"]) for row in longest.values() for part in row["survival"]})
    for i, system in enumerate(systems):
        if system in longest:
            found = longest[system]["survival"]
            below, above = zip(*map(_spread, found), strict=True)
            places = [ages.index((part["from"], part["to"])) for part in found]
            means = [part["mean"] for part in found]
            axis.errorbar(places, means, [below, above], marker="os^dvx"[i % 6], label=system, capsize=2)
    axis.set(xlabel="edits made since", title="still right at the end", ylim=(-0.03, 1.03))
    axis.set_xticks(range(len(ages)), [str(low) if low == high else f"{low} to {high}" for low, high in ages])
    axis.grid(alpha=0.3)


def _spread(figure: dict[str, float]) -> tuple[float, float]:
    return max(0.0, figure["mean"] - figure["low"]), max(0.0, figure["high"] - figure["mean"])


def _bars(axis: Any, rows: Sequence[dict[str, Any]], systems: list[str], name: str) -> None:
    found = [(systems.index(row["name"]), row["figures"][name]) for row in rows if name in row["figures"]]
    for place, figure in found:
        below, above = _spread(figure)
        color = "tab:blue" if place == 0 else "tab:gray"
        axis.barh(place, figure["mean"], xerr=[[below], [above]], color=color, error_kw={"elinewidth": 1})
        axis.annotate(  # a bar of 0 is none, and its number is there all the same
            number(name, figure["mean"]), (max(figure["mean"], 0), place), (3, 4), textcoords="offset points",
            fontsize="xx-small",
        )  # fmt: skip
    if not any(figure["mean"] for _, figure in found):
        axis.set_xlim(-0.02, 1)
    axis.locator_params(axis="x", nbins=5)
    axis.set_yticks(range(len(systems)), systems)
    axis.set_ylim(len(systems) - 0.5, -0.5)


def _lines(axis: Any, rows: Sequence[dict[str, Any]], systems: list[str], name: str) -> None:
    for i, system in enumerate(systems):
        found = [(row["k"], row["figures"][name]) for row in rows if row["name"] == system and name in row["figures"]]
        if found:
            below, above = zip(*(_spread(figure) for _, figure in found), strict=True)
            means = [figure["mean"] for _, figure in found]
            axis.errorbar([k for k, _ in found], means, [below, above], marker="os^dvx"[i % 6], label=system, capsize=2)
    sizes = sorted({row["k"] for row in rows})
    axis.set(xscale="log")
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.minorticks_off()
