"""Edits one after the other, all of them asked again at the end: how old edits fare."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..baselines import System
from ..baselines.measure import Interval, bootstrap
from ..baselines.turns import Turns

SIZES = (1, 10, 100, 1000)


def sizes_for(sizes: Sequence[int], examples: int) -> list[int]:
    """The lengths of sequences that there are examples for, the longest cut to those."""
    return sorted({min(size, examples) for size in sizes})


@contextlib.contextmanager
def kept(system: System, path: Path) -> Iterator[None]:
    """Within the block a sequence of ``system`` is kept in a file, from which it goes on after a kill; what has been
    measured when the block ends well needs none."""
    system.turns = Turns(path)
    try:
        yield
        system.turns.forget()
    finally:
        system.turns = None


def age_of(later: int) -> tuple[int, int]:
    """The first and the last age of the decade that ``later``, the number of edits made since, belongs to."""
    first = 10 ** (len(str(later)) - 1) if later else 0
    return first, 10 * first - 1 if later else 0


def survival(rows: Sequence[dict[str, Any]], *, seed: int = 0) -> list[dict[str, Any]]:
    """Of measured sequences the share of edits still answered right (teacher-forced), by how many came after."""
    ages: dict[tuple[int, int], list[float]] = defaultdict(list)
    for row in rows:
        for i, right in enumerate(row.get("right", ())):
            ages[age_of(len(row["right"]) - 1 - i)].append(float(right))
    return [{"from": low, "to": high, **bootstrap(ages[low, high], seed=seed).to_dict()} for low, high in sorted(ages)]


def by_edit(rows: Sequence[dict[str, Any]], *, seed: int = 0) -> dict[str, Interval]:
    """The figures that every edit of a sequence has its own share in, with the interval over all edits."""
    found = {}
    for name, figure in (("right", "efficacy"), ("exact", "exact_match")):
        if values := [float(value) for row in rows for value in row.get(name, ())]:
            found[figure] = bootstrap(values, seed=seed)
    return found
