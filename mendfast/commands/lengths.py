"""Edits by the length of their targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

EDGES = (1, 16, 46, 91)
"""The first length, in tokens, of each part: about 10, 30, 60 and 120."""
LENGTHENED = ("efficacy", "token_accuracy", "exact_match", "rouge_l", "never_stopped")
"""Figures that are shown of each part."""


def by_length(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of edits that were measured one at a time the means of :data:`LENGTHENED`, by their targets' tokens; nothing
    where none is longer than the first part's."""
    single = [row for row in rows if len(row.get("tokens", ())) == 1 and "figures" in row]
    if not any(row["tokens"][0] >= EDGES[1] for row in single):
        return []
    found = []
    for low, following in zip(EDGES, (*EDGES[1:], None), strict=True):
        part = [row["figures"] for row in single if low <= row["tokens"][0] < (following or row["tokens"][0] + 1)]
        if not part:
            continue
        values = {name: [row[name] for row in part if row.get(name) is not None] for name in LENGTHENED}
        means = {name: sum(kept) / len(kept) for name, kept in values.items() if kept}
        found.append({"from": low, "to": following and following - 1, "n": len(part), "figures": means})
    return found
