"""``mendfast eval``: systems side by side on one task, resumable, with a report."""

from __future__ import annotations

import argparse
import inspect
import json
import math
import platform
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from tqdm import tqdm

from ..baselines import SYSTEMS, System, make_system
from ..baselines.measure import measure, summarise
from ..baselines.mend import Identity, Mend
from ..editor import MendEditor
from ..files import atomic_write
from ..tasks.load import load_task
from ..tasks.records import Example, Problem
from ..tasks.task import Known, Task, refusal, usable
from ..training import TrainConfig
from .doctor import device_name
from .eval_report import console_table, write_report

TABLES = {
    "systems": ("mend", "enn", "ke", "ft", "ft_kl", "identity"),
    "variants": ("mend", *(key for key in SYSTEMS if key.startswith("mend_"))),
    "batched": ("mend", "enn", "ft"),
}
SIZES = (1, 5, 25, 75, 125)
SHOWN = 8  # edits whose answers before and after go into the report
FITTED_WITH = (
    "steps", "batch_size", "joint", "learning_rate", "alpha_learning_rate", "c_edit", "validate_every", "patience",
)  # fmt: skip
"""Options of :class:`TrainConfig` that the command takes."""


def evaluate(editor: MendEditor, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the command does; returns what ``results.json`` holds.

    Raises:
        ValueError, FileNotFoundError: an unknown system, data that can't be read or that the model can't serve,
            systems that need training without --train-data, an output directory of another evaluation.
    """
    console = Console()
    with_training = arguments.train_data is not None
    keys, left_out = _systems(arguments.table, arguments.systems, with_training)
    if left_out:
        console.print(f"Left out, since they are trained first (--train-data): {', '.join(left_out)}.")
    read = {"seed": arguments.seed, "tokenizer": editor.tokenizer}
    task = load_task(arguments.task, arguments.data, limit=arguments.limit, **read)
    task.check(editor.model, editor.kind)
    examples, refused = usable(editor, task.examples)
    problems = [*task.problems, *refused]
    tell(problems, console)
    if not examples:
        raise ValueError(f"The model can be asked none of the {len(task.examples)} edits; the first: {refused[0]}")
    known = _known(editor, task, arguments, read)
    sizes = [size for size in (arguments.sizes if arguments.table == "batched" else (1,)) if size <= len(examples)]
    if not sizes:
        raise ValueError(f"There are {len(examples)} edits, fewer than --sizes {arguments.sizes}; pass smaller ones.")
    fitting = _Fitting(editor, arguments, read) if with_training else None
    journal = Journal(arguments.output, _settings(arguments, task))
    started = time.perf_counter()
    for key in keys:
        _evaluate_system(key, editor, fitting, journal, examples, known, sizes, arguments)
    rows = [_row(journal, key, size, arguments.seed) for size in sizes for key in keys]
    if not any(row["figures"] for row in rows):
        error = next((row["first_error"] for row in rows if row["first_error"]), None)
        raise ValueError(
            f"No edit worked with any system; the first error: {error}"
            if error
            else "No system has a figure to show, though none failed: the data asks nothing that they measure."
        )
    result = {
        **journal.settings,
        "edits": len(examples),
        "read": len(task.examples),
        "problems": [str(problem) for problem in problems],
        "seconds": round(time.perf_counter() - started, 1),
        "environment": _environment(editor),
        "rows": rows,
        "examples": journal.shown(keys, sizes[0]),
    }
    console.print(console_table(result))
    if arguments.output:
        console.print(f"Report: {write_report(arguments.output, result)}")
    return result


def _systems(table: str, chosen: Sequence[str] | None, with_training: bool) -> tuple[list[str], list[str]]:
    """The systems to measure, and those of the table that there is no training data for."""
    keys = list(chosen or TABLES[table])
    if unknown := [key for key in keys if key not in SYSTEMS]:
        raise ValueError(f"System {unknown[0]!r} is unknown; choose from {', '.join(SYSTEMS)}.")
    missing = [] if with_training else [key for key in keys if is_fitted(key, table)]
    kept = [key for key in keys if key not in missing]
    if missing and (chosen or table == "variants"):
        raise ValueError(f"{', '.join(missing)} must be trained first; pass --train-data, and --output to keep them.")
    return list(dict.fromkeys(kept)), missing


def is_fitted(key: str, table: str) -> bool:
    """Whether the command trains the system. Among its variants MEND is trained as long as they are."""
    return key not in ("ft", "identity") and (key != "mend" or table == "variants")


def tell(problems: Sequence[Problem], console: Console) -> None:
    """Print the first problems, and how many there are."""
    for problem in problems[:5]:
        console.print(f"[yellow]{problem}[/]", highlight=False)
    if len(problems) > 5:
        flagged = sum(problem.kept for problem in problems)
        console.print(f"[yellow]in all {len(problems) - flagged} problems, and {flagged} flagged and kept[/]")


def _known(editor: MendEditor, task: Task, arguments: argparse.Namespace, read: dict[str, Any]) -> list[Known]:
    """What an edit must leave alone; empty where each example has its own."""
    if arguments.known:
        found = load_task(arguments.task, arguments.known, **read).known()
    elif any(answer for example in task.examples for _, answer in example.locality):
        return []
    else:
        found = task.known()
    return [item for item in found if not refusal(editor, item.prompt, item.answer)]


def _settings(arguments: argparse.Namespace, task: Task) -> dict[str, Any]:
    """What two parts of one evaluation must have in common."""
    names = ("table", "model", "editor", "data", "known", "limit", "unrelated", "seed", "train_data", *FITTED_WITH)
    values = {name: getattr(arguments, name) for name in names}
    return {"task": task.key, **values, "fine_tuning_rate": arguments.fine_tuning_rate, "option": arguments.option}


def _environment(editor: MendEditor) -> dict[str, str]:
    return {
        "device": device_name(editor.device),
        "model": f"{type(editor.model).__name__}, {sum(p.numel() for p in editor.model.parameters()):,} parameters",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


# -- one system --------------------------------------------------------------------------------------------


def _evaluate_system(
    key: str,
    editor: MendEditor,
    fitting: _Fitting | None,
    journal: Journal,
    examples: Sequence[Example],
    known: Sequence[Known],
    sizes: Sequence[int],
    arguments: argparse.Namespace,
) -> None:
    groups = {size: len(examples) // size for size in sizes}
    if journal.has_system(key) and all((key, k, i) in journal for k in sizes for i in range(groups[k])):
        return
    system = _prepare(key, editor, fitting, arguments)
    journal.add_system(system)
    for size in sizes:
        bar = tqdm(range(groups[size]), f"{system.name}, {size} at once" if size > 1 else system.name, disable=None)
        for i in bar:
            if (key, size, i) not in journal:
                group = examples[i * size : (i + 1) * size]
                rng = random.Random(f"{arguments.seed}:{size}:{i}")
                show = i < SHOWN and size == sizes[0]
                row = measure_group(system, group, _locality(group, known, arguments.unrelated, rng), show=show)
                journal.add({"system": key, "k": size, "group": i, **row})
            bar.set_postfix(journal.running(key, size))


def measure_group(
    system: System, group: Sequence[Example], locality: Sequence[tuple[str, str]], *, show: bool = False
) -> dict[str, Any]:
    """One simultaneous edit by all of ``group`` as a line of the journal; an edit that fails is a line too."""
    first = group[0]
    asked = [first.prompt, *first.rephrasings[:1], *(prompt for prompt, _ in locality[:1])]
    try:
        outcome = measure(
            system,
            [(example.prompt, example.target) for example in group],
            [(wording, example.target) for example in group for wording in example.rephrasings],
            locality,
            [pair for example in group for pair in example.portability],
            show=asked if show else (),
        )
    except (ValueError, RuntimeError, ArithmeticError) as error:  # of the data, of memory: not of the program
        return {"error": f"{type(error).__name__}: {error}"}
    # JSON has no NaN.
    figures = {name: value if math.isfinite(value) else None for name, value in outcome.figures.items()}
    kinds = ["edit", *["rephrasing"] * bool(first.rephrasings), "unrelated"]
    shown = [(kind, *rest) for kind, rest in zip(kinds, outcome.shown, strict=False)]
    return {"figures": figures, **({"shown": shown, "target": first.target} if show else {})}


def _locality(
    group: Sequence[Example], known: Sequence[Known], count: int, rng: random.Random
) -> list[tuple[str, str]]:
    if not known:
        return [(prompt, answer) for example in group for prompt, answer in example.locality if answer]
    prompts = {prompt for example in group for prompt in (example.prompt, *example.rephrasings)}
    subjects = {example.subject for example in group} - {None}
    drawn = rng.sample(range(len(known)), min(len(known), count + 8 * len(prompts)))
    others = [known[i] for i in drawn if known[i].prompt not in prompts and known[i].subject not in subjects]
    return [(item.prompt, item.answer) for item in others[:count]]


def _prepare(key: str, editor: MendEditor, fitting: _Fitting | None, arguments: argparse.Namespace) -> System:
    if is_fitted(key, arguments.table):
        return fitting.system(key)
    if key == "mend":
        return Mend(editor)
    if key == "identity":
        return Identity(editor.untrained())
    options, _ = _options(key, arguments)
    return make_system(key, editor.model, editor.tokenizer, editor.config, **options)


def _options(key: str, arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """What --option says of a system: arguments of its constructor, and changes of its training."""
    accepted = set(inspect.signature(SYSTEMS[key]).parameters) - {"subject"}
    options = {"learning_rate": arguments.fine_tuning_rate} if key in ("ft", "ft_kl") else {}
    training: dict[str, Any] = {}
    for text in arguments.option:
        name, found, value = text.partition("=")
        system, _, name = name.partition(".")
        if not found or system not in SYSTEMS:
            raise ValueError(f"--option {text!r} is not SYSTEM.NAME=VALUE with a system of {', '.join(SYSTEMS)}.")
        if system != key:
            continue
        known = {field.name for field in fields(TrainConfig)}
        if name not in accepted | known:
            raise ValueError(f"{key} has no option {name!r}; it has {', '.join(sorted(accepted | known))}.")
        try:
            (options if name in accepted else training)[name] = json.loads(value)
        except json.JSONDecodeError:
            raise ValueError(f"--option {text!r}: the value is no number, true, false or list.") from None
    return options, training


class _Fitting:
    """Trains systems, once for an output directory: ``systems/<key>/`` there."""

    def __init__(self, editor: MendEditor, arguments: argparse.Namespace, read: dict[str, Any]):
        self.editor, self.arguments = editor, arguments
        self.task = load_task(arguments.task, arguments.train_data, **read)

    def system(self, key: str) -> System:
        """The trained system: what an earlier run kept, or what this one trains, going on where it was cut off."""
        arguments, editor = self.arguments, self.editor
        options, training = _options(key, arguments)
        settings = {name: getattr(arguments, name) for name in FITTED_WITH}
        config = TrainConfig(**{**settings, "seed": arguments.seed, **training})
        torch.manual_seed(arguments.seed)
        system = make_system(key, editor.model, editor.tokenizer, editor.config, **options)
        directory = Path(arguments.output) / "systems" / key if arguments.output else None
        made = json.loads(json.dumps({"options": options, "config": asdict(config), "data": arguments.train_data}))
        if directory and (directory / "fitted.json").is_file():
            if json.loads((directory / "fitted.json").read_text()) != made:
                raise ValueError(f"{directory} was trained with other settings; choose another --output.")
            system.load(directory / "final")
            return system
        system.fit(
            self.task.sampler(arguments.seed),
            config,
            output=directory,
            validation=self.task.sampler(arguments.seed + 1, held_out=True),
        )
        if directory:
            if (directory / "best").is_dir():
                system.load(directory / "best")
            system.save(directory / "final")
            atomic_write(directory / "fitted.json", json.dumps(made, indent=2).encode())
        return system


# -- what has been measured --------------------------------------------------------------------------------


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
            before = json.loads(saved.read_text())
            if changed := [name for name, value in self.settings.items() if before.get(name) != value]:
                raise ValueError(
                    f"{directory} holds an evaluation with other settings ({', '.join(changed)}); "
                    "go on with the same ones, or choose another --output."
                )
            self._read()
        else:
            atomic_write(saved, json.dumps(self.settings, indent=2).encode() + b"\n")

    def _read(self) -> None:
        if not self._path.is_file():
            return
        whole = []
        for line in self._path.read_bytes().splitlines():
            try:
                self._take(json.loads(line))
            except ValueError:
                continue  # the line that a kill cut short
            whole.append(line + b"\n")
        atomic_write(self._path, b"".join(whole))

    def _take(self, line: dict[str, Any]) -> None:
        if "parameters" in line:
            self._systems[line["system"]] = line
        else:
            self._rows[line["system"], line["k"], line["group"]] = line
            for name, value in line.get("figures", {}).items():
                if value is not None:
                    total, count = self._totals[line["system"], line["k"], name]
                    self._totals[line["system"], line["k"], name] = total + value, count + 1

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


def _row(journal: Journal, key: str, size: int, seed: int) -> dict[str, Any]:
    rows = journal.rows(key, size)
    errors = [row["error"] for row in rows if "error" in row]
    summary = summarise([row["figures"] for row in rows if "figures" in row], seed=seed)
    return {
        **journal.system(key),
        "k": size,
        "measured": len(rows) - len(errors),
        "failed": len(errors),
        "first_error": errors[0] if errors else None,
        "figures": {name: interval.to_dict() for name, interval in summary.items()},
    }
