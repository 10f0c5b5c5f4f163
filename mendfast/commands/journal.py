"""What an evaluation has measured so far, a line at a time, so that it goes on where it was cut off."""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..baselines import System
from ..files import atomic_write, json_lines, keep_json_lines, read_json_bytes
from ..schema import check_object, check_settings, parse_json
from ..training.processes import Processes

ADDED = {
    "dtype": "auto", "quantize": None, "revision": None, "text": None, "validation": 0, "harness": None,
    "harness_limit": None,
}  # fmt: skip
"""Settings that older journals do not name, and what they were then."""


class Journal:
    """A line for each evaluated edit of each system, so that an evaluation goes on where it was cut off.

    Of several processes each has a file of its own; all read all of them at the start.

    Args:
        directory: holds ``edits.jsonl`` and ``settings.json``; None keeps everything in memory.
        settings: of the evaluation.

    Raises:
        ValueError: the directory holds an evaluation with other settings.
    """

    def __init__(self, directory: str | Path | None, settings: dict[str, Any], processes: Processes | None = None):
        self.settings = json.loads(json.dumps(settings))
        self.processes = processes or Processes()
        self._rows: dict[tuple[str, int, int], dict[str, Any]] = {}
        self._systems: dict[str, dict[str, Any]] = {}
        self._harness: dict[str, dict[str, Any]] = {}
        self._totals: dict[tuple[str, int, str], tuple[float, int]] = defaultdict(lambda: (0.0, 0))
        self._path: Path | None = None
        if directory is None:
            return
        directory = Path(directory)
        if self.processes.main:
            self._check(directory)
        self.processes.most(0)
        for path in sorted(directory.glob("edits*.jsonl")):
            if self.processes.main:
                keep_json_lines(path, self._take)
            else:
                for _, line in json_lines(path):
                    with contextlib.suppress(LookupError, TypeError, AttributeError, ValueError):
                        self._take(line)
        self.processes.most(0)  # nobody writes while another reads
        self._path = directory / ("edits.jsonl" if self.processes.main else f"edits.{self.processes.rank}.jsonl")

    def _check(self, directory: Path) -> None:
        saved = directory / "settings.json"
        if saved.is_file():
            before = ADDED | check_object(parse_json(read_json_bytes(saved), str(saved)), str(saved))
            advice = "go on with the same ones, or choose another --output."
            check_settings(f"{directory} holds an evaluation", before, self.settings, advice)
        else:
            for path in directory.glob("edits*.jsonl"):  # of which nobody knows what they were measured with
                path.replace(path.with_suffix(".jsonl.old"))
            atomic_write(saved, json.dumps(self.settings, indent=2).encode() + b"\n")

    def _take(self, line: dict[str, Any]) -> bool:
        """Count a line in; raises for one that is none of ours."""
        if "parameters" in line:
            self._systems[line["system"]] = line
        elif "harness" in line:
            self._harness[line["system"]] = line["harness"]
        elif (line["system"], line["k"], line["group"]) not in self._rows:
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

    def add_system(
        self, system: System, chosen: dict[str, Any] | None = None, editor: str | None = None
    ) -> None:
        """Keep a system's name and size, its rate and steps where they were chosen, and which ``editor`` it is of."""
        if not self.has_system(system.key):
            line = {"system": system.key, "name": system.name, "parameters": system.parameter_count()}
            line |= {"chosen": chosen} if chosen else {}
            line |= {"editor": editor} if editor else {}
            if self.processes.main:
                self._write(line)
            else:
                self._take(json.loads(json.dumps(line)))

    def check_editor(self, key: str, editor: str) -> None:
        """A ValueError if what was measured of the system is of another editor, though of the same name."""
        before = self._systems.get(key, {}).get("editor")
        if before and before != editor:
            raise ValueError(
                f"What this evaluation has measured of {key} is of another editor than the one that is loaded now (its "
                f"parameters or its metric differ: {before}, {editor}); choose another --output, or load that editor."
            )

    def add_harness(self, key: str, found: dict[str, Any]) -> None:
        """Keep what the tasks of the harness gave of a system."""
        self._write({"system": key, "harness": found})

    def has_harness(self, key: str) -> bool:
        return key in self._harness

    def harness(self, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
        return {key: self._harness[key] for key in keys if self._harness.get(key)}

    def gather(self) -> None:
        """Take over what the other processes have measured."""
        for rows in self.processes.objects(list(self._rows.values())):
            for row in rows:
                self._take(row)

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
