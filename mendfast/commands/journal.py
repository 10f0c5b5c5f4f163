"""What an evaluation has measured so far, a line at a time, so that it goes on where it was cut off."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..baselines import System
from ..files import atomic_write, keep_json_lines, read_json_bytes
from ..schema import check_object, check_settings, parse_json

ADDED = {"dtype": "auto", "quantize": None, "revision": None, "text": None}
"""Settings that older journals do not name, and what they were then."""


class Journal:
    """A line for each evaluated edit of each system, so that an evaluation goes on where it was cut off.

    Args:
        directory: holds ``edits.jsonl`` and ``settings.json``; None keeps everything in memory.
        settings: of the evaluation.

    Raises:
        ValueError: the directory holds an evaluation with other settings.
    """

    def __init__(self, directory: str | Path | None, settings: dict[str, Any]):
        self.settings = json.loads(json.dumps(settings))
        self._rows: dict[tuple[str, int, int], dict[str, Any]] = {}
        self._systems: dict[str, dict[str, Any]] = {}
        self._totals: dict[tuple[str, int, str], tuple[float, int]] = defaultdict(lambda: (0.0, 0))
        self._path = Path(directory) / "edits.jsonl" if directory else None
        if self._path is None:
            return
        saved = self._path.with_name("settings.json")
        if saved.is_file():
            before = ADDED | check_object(parse_json(read_json_bytes(saved), str(saved)), str(saved))
            advice = "go on with the same ones, or choose another --output."
            check_settings(f"{directory} holds an evaluation", before, self.settings, advice)
            self._read()
        else:
            atomic_write(saved, json.dumps(self.settings, indent=2).encode() + b"\n")

    def _read(self) -> None:
        if self._path.is_file():
            keep_json_lines(self._path, self._take)

    def _take(self, line: dict[str, Any]) -> bool:
        """Count a line in; raises for one that is none of ours."""
        if "parameters" in line:
            self._systems[line["system"]] = line
        else:
            self._rows[line["system"], line["k"], line["group"]] = line
            for name, value in line.get("figures", {}).items():
                if value is not None:
                    total, count = self._totals[line["system"], line["k"], name]
                    self._totals[line["system"], line["k"], name] = total + value, count + 1
        return True

    def _write(self, line: dict[str, Any]) -> None:
        self._take(json.loads(json.dumps(line)))
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def add(self, row: dict[str, Any]) -> None:
        """Keep what one edit gave: its figures, or its error."""
        self._write(row)

    def add_system(self, system: System) -> None:
        """Keep a system's name and size."""
        if not self.has_system(system.key):
            self._write({"system": system.key, "name": system.name, "parameters": system.parameter_count()})

    def has_system(self, key: str) -> bool:
        return key in self._systems

    def __contains__(self, place: tuple[str, int, int]) -> bool:
        return place in self._rows

    def rows(self, key: str, size: int) -> list[dict[str, Any]]:
        """The lines of one system and size, in the order of the edits."""
        return [row for place, row in sorted(self._rows.items()) if place[:2] == (key, size)]

    def system(self, key: str) -> dict[str, Any]:
        return self._systems[key]

    def running(self, key: str, size: int) -> dict[str, str]:
        """Means so far, for the progress bar."""
        shown = {"ES": "edit_success", "GEN": "generality", "DD": "drawdown"}
        totals = {label: self._totals[key, size, name] for label, name in shown.items()}
        return {label: f"{total / count:.3f}" for label, (total, count) in totals.items() if count}

    def shown(self, keys: Sequence[str], size: int) -> list[dict[str, Any]]:
        """The edits whose answers were kept: target, and each question's answers before and after, by system."""
        found: dict[int, dict[str, Any]] = {}
        for key in keys:
            for row in self.rows(key, size):
                if "shown" in row:
                    edit = found.setdefault(row["group"], {"target": row["target"], "questions": []})
                    for i, (kind, prompt, before, after) in enumerate(row["shown"]):
                        if i == len(edit["questions"]):
                            edit["questions"].append({"kind": kind, "prompt": prompt, "before": {}, "after": {}})
                        edit["questions"][i]["before"][key] = before
                        edit["questions"][i]["after"][key] = after
        return [edit for _, edit in sorted(found.items())]
