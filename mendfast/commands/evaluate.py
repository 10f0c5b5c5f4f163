"""``mendfast eval``: systems side by side on one task, resumable, with a report."""

from __future__ import annotations

import contextlib
import json
import math
import platform
import random
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from tqdm import tqdm

from ..baselines import SYSTEMS, System, make_system
from ..baselines.asking import at_once
from ..baselines.measure import Before, measuring, summarise
from ..baselines.mend import Mend
from ..baselines.rome import Rome
from ..editor import MendEditor
from ..files import atomic_write, read_json_bytes
from ..schema import check_object, check_settings, parse_json
from ..tasks.load import load_task
from ..tasks.records import Example, Problem
from ..tasks.task import usable
from ..training import TrainConfig
from ..training.data import digest
from ..training.processes import Processes, together
from ..updates import checksum
from . import sequences
from .console import make_console, text
from .doctor import device_name
from .eval_page import write_report
from .eval_report import caption, console_table
from .eval_settings import SEEDS, EvalSettings, is_fitted
from .harness import Harness
from .journal import Journal
from .lengths import by_length
from .loading import load_editor
from .pending import FAILURES, Measuring, Pending
from .protected import Protected
from .questions import Questions
from .rates import NAMES, Choice, chosen_by

__all__ = ["SEEDS", "EvalSettings", "compare", "evaluate", "measure_group", "tell"]

SHOWN = 8  # edits whose answers before and after go into the report


def compare(settings: EvalSettings) -> dict[str, Any] | None:
    """What the command does; see :func:`evaluate`. None of all processes but the first."""
    with together() as accelerator:
        device = str(accelerator.device) if accelerator else None
        return evaluate(load_editor(settings, device), settings, Processes(accelerator))


def evaluate(
    editor: MendEditor, settings: EvalSettings, processes: Processes | None = None
) -> dict[str, Any] | None:
    """What the command does; returns what ``results.json`` holds, in the first of several processes.

    Those share the edits; each keeps its own part of the journal, and the first puts the results together.

    Raises:
        ValueError, FileNotFoundError: an unknown system, data that can't be read or that the model can't serve,
            systems that need training without --train-data, an output directory of another evaluation.
    """
    processes = processes or Processes()
    console = make_console(quiet=not processes.main)
    keys, left_out = settings.chosen_systems()
    read = {"seed": settings.seed, "tokenizer": editor.tokenizer}
    spared = settings.validation if any(_chosen(key, editor, settings) for key in keys) else 0
    task = load_task(settings.task, settings.data, limit=settings.limit and settings.limit + spared, **read)
    task.check(editor.model, editor.kind)
    examples, refused = usable(editor, task.examples)
    problems = [*task.problems, *refused]
    tell(problems, console)
    if not examples:
        raise ValueError(f"The model can be asked none of the {len(task.examples)} edits; the first: {refused[0]}")
    if not settings.systems:
        left_out |= _unfit(keys, editor, examples)
        keys = [key for key in keys if key not in left_out]
    for reason in dict.fromkeys(left_out.values()):
        names = ", ".join(key for key, why in left_out.items() if why == reason)
        console.print(text(f"Left out: {names}, since {reason}."), soft_wrap=True)
    examples, validation = _split(examples, settings.limit, spared)
    count = len(task.examples) - len(validation)
    task.examples = [example for example in task.examples if example not in validation]
    if settings.limit:
        task.examples, count = task.examples[: settings.limit], min(count, settings.limit)
    sizes = settings.sizes_for(len(examples))
    in_turn = settings.table == "sequential"
    questions = Questions(editor, task, settings.known, settings.unrelated, settings.text, in_turn, **read)
    choice = None
    if validation:
        at_once = settings.table == "batched"
        choice = Choice(validation, questions, processes, at_once=at_once, in_turn=in_turn, seed=settings.seed)
    elif spared:
        console.print("There are too few edits to choose rates on; each system takes its own default.")
    fitting = _Fitting(editor, settings, read, processes) if settings.train_data is not None else None
    journal = Journal(settings.output, settings.in_common(), processes)
    harness = Harness(settings.harness, settings.harness_limit) if settings.harness else None
    run = _Run(editor, settings, processes, journal, keys, examples, questions, sizes, fitting, choice, harness)
    started = time.perf_counter()
    for key in keys:
        run.system(key)
    journal.gather()
    if not processes.main:
        return None
    rows = [_row(journal, key, size, settings.seed) for size in sizes for key in keys]
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
        "read": count,
        "problems": [str(problem) for problem in problems],
        "left_out": left_out,
        "seconds": round(time.perf_counter() - started, 3),
        "environment": _environment(editor),
        "rows": rows,
        "examples": journal.shown(keys, sizes[0]),
        **({"harness_results": journal.harness(keys)} if harness else {}),
    }
    console.print(text(caption(result)), soft_wrap=True)
    console.print(console_table(result))
    if settings.output:
        console.print(text(f"Report: {write_report(settings.output, result)}"))
    return result


def _chosen(key: str, editor: MendEditor, settings: EvalSettings) -> bool:
    """Whether something of the system is chosen on validation edits."""
    made, _ = settings.options_of(key)
    kind = SYSTEMS[key]
    if issubclass(kind, Mend) and not kind.weighs(editor.config):
        return False
    return any(chosen_by(kind, tuple(made), at_once=settings.table == "batched"))


def _split(examples: list[Example], limit: int | None, spared: int) -> tuple[list[Example], list[Example]]:
    """The edits that are measured, and up to ``spared`` that rates are chosen on: those beyond the limit, or the last,
    a quarter at most."""
    if limit and len(examples) > limit:
        return examples[:limit], examples[limit : limit + spared]
    spared = min(spared, len(examples) // 4)
    return examples[: len(examples) - spared], examples[len(examples) - spared :]


def _unfit(keys: Sequence[str], editor: MendEditor, examples: Sequence[Example]) -> dict[str, str]:
    """Systems of the table that this model or data have no use for, with the reason."""
    found = {}
    for key in keys:
        if key == "mend_sum" and editor.config.aggregation == "sum":
            found[key] = "it is mend, whose editor sums already"
        elif issubclass(SYSTEMS[key], Rome) and editor.kind != "causal":
            found[key] = f"it edits causal language models, and this is a {editor.kind}"
        elif issubclass(SYSTEMS[key], Rome) and not any(part.subject for e in examples for part in e.parts):
            found[key] = "the data names no subject"
    return found


def tell(problems: Sequence[Problem], console: Console) -> None:
    """Print the first problems, and how many there are."""
    for problem in problems[:5]:
        console.print(text((str(problem), "yellow")))
    if len(problems) > 5:
        flagged = sum(problem.kept for problem in problems)
        console.print(f"[yellow]in all {len(problems) - flagged} problems, and {flagged} flagged and kept[/]")


def _digest(editor: MendEditor) -> str:
    """A short name for an editor's parameters, and for what it protects."""
    held = editor.state_dict()
    for layer in editor.layers if editor.metric is not None else ():
        parts = editor.metric.spectrum(layer.name)._asdict()
        held |= {f"{layer.name}:{part}": value for part, value in parts.items()}
    return digest(sorted(f"{name} {int(checksum(value))}" for name, value in held.items()))


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


class _Run:
    """One evaluation, system after system."""

    def __init__(
        self,
        editor: MendEditor,
        settings: EvalSettings,
        processes: Processes,
        journal: Journal,
        keys: Sequence[str],
        examples: Sequence[Example],
        questions: Questions,
        sizes: Sequence[int],
        fitting: _Fitting | None,
        choice: Choice | None,
        harness: Harness | None,
    ):
        self.editor, self.settings, self.processes, self.journal = editor, settings, processes, journal
        self.examples, self.questions, self.sizes = examples, questions, sizes
        self.fitting, self.choice, self.harness = fitting, choice, harness
        self.protected = Protected(settings, keys, processes)
        self.which: str | None = None  # the editor's digest
        self.before: Before | None = None  # what is known of the unedited model
        self._asked: dict[tuple[int, int], dict[str, Any]] = {}
        self.in_turn = settings.table == "sequential"

    def system(self, key: str) -> None:
        """Measure what the journal lacks."""
        settings, journal, processes = self.settings, self.journal, self.processes
        groups = {size: settings.groups(size, len(self.examples)) for size in self.sizes}
        wanted = [(key, size, i) for size in self.sizes for i in range(groups[size])]
        asks = self.harness is not None and not journal.has_harness(key)
        of_editor = issubclass(SYSTEMS[key], Mend) and not is_fitted(key, settings.table)
        if of_editor:
            self.which = self.which or _digest(self.editor)
            journal.check_editor(key, self.which)
        if journal.has_system(key) and not asks and all(place in journal for place in wanted):
            return
        system = self._prepare(key)
        examples = [*self.examples, *(self.choice.examples if self.choice else ())]
        system.subjects = {e.prompt: e.subject for example in examples for e in example.parts if e.subject}
        if self.before is None or not self.before.serves(system.subject):
            self.before = Before(system.subject, self.questions.texts())
        if isinstance(system, Rome):
            system.protect_with(self.protected.metric(system))
        self._choose(system, self.which if of_editor else None)
        for size in self.sizes:
            how = "in turn" if self.in_turn else "at once"
            many = f"{system.name}, {size} {how}" if size > 1 else system.name
            mine = range(processes.rank, groups[size], processes.count)
            self.before.expect(prompt for i in mine for prompt in self._said(size, i))
            bar = tqdm(mine, many, disable=None if processes.main else True)
            pending = Pending(system, lambda place, row: journal.add({**place, **row}))
            try:
                for i in bar:
                    if (key, size, i) not in journal:
                        self._measure(system, size, i, pending)
                    bar.set_postfix(journal.running(key, size))
            finally:  # an interrupt throws none of them away
                pending.flush()
        if asks and processes.main:
            group = self._group(self.sizes[-1], 0)
            journal.add_harness(key, self.harness.ask(system, group, in_turn=self.in_turn))

    def _choose(self, system: System, editor: str | None) -> None:
        """The system's rate and steps, as an earlier run chose them, or on validation edits."""
        kept = self.journal.system(system.key).get("chosen") if self.journal.has_system(system.key) else None
        fixed = tuple(self.settings.options_of(system.key)[0])
        if kept:
            for name in NAMES:
                if name in kept:
                    setattr(system, name, kept[name])
        elif self.choice is not None and not self.journal.has_system(system.key):
            kept = self.choice.choose(system, self.before, fixed)
        self.journal.add_system(system, kept, editor)

    def _group(self, size: int, i: int) -> list[Example]:
        return [part for example in self.examples[i * size : (i + 1) * size] for part in example.parts]

    def _measure(self, system: System, size: int, i: int, pending: Pending) -> None:
        group, asked = self._group(size, i), self._after(size, i)
        show = self._shown(size, i)
        place = {"system": system.key, "k": size, "group": i}
        options = {"show": show, "before": self.before, "in_turn": self.in_turn, "part": self._part(size, i)}
        with contextlib.ExitStack() as stack:
            if self.in_turn and self.settings.output:
                directory = Path(self.settings.output) / "unfinished"
                stack.enter_context(sequences.kept(system, directory / f"{system.key}-{size}-{i}.safetensors"))
            pending.add(place, _measuring(system, group, asked, later=not self.in_turn, **options))

    def _after(self, size: int, i: int) -> dict[str, Any]:
        """What is asked after a group: the same of all systems."""
        if (size, i) not in self._asked:
            rng = random.Random(f"{self.settings.seed}:{size}:{i}")
            self._asked[size, i] = self.questions.after(self._group(size, i), rng, brief=self.in_turn)
        return self._asked[size, i]

    def _part(self, size: int, i: int) -> int | None:
        """Which part of the running text is read after a group: each has its turn, where there are groups enough."""
        parts = self.before.parts
        enough = not self.in_turn and self.settings.groups(size, len(self.examples)) >= parts > 0
        return i % parts if enough else None

    def _shown(self, size: int, i: int) -> bool:
        return i < SHOWN and size == self.sizes[0]

    def _said(self, size: int, i: int) -> list[str]:
        """Questions that the unedited model is asked for a group."""
        asked = self._after(size, i)
        found = [prompt for prompt, _ in asked["locality"]]
        found += [prompt for prompts in asked["near"].values() for prompt in prompts]
        return found + (_to_show(self._group(size, i), asked) if self._shown(size, i) else [])

    def _prepare(self, key: str) -> System:
        if is_fitted(key, self.settings.table):
            return self.fitting.system(key)
        options, _ = self.settings.options_of(key)
        if issubclass(SYSTEMS[key], Mend):
            return SYSTEMS[key].of(self.editor, **options)
        return make_system(key, self.editor.model, self.editor.tokenizer, self.editor.config, **options)


def measure_group(
    system: System, group: Sequence[Example], asked: dict[str, Any], **options: Any
) -> dict[str, Any]:
    """One edit by all of ``group`` as a line of the journal; an edit that fails is a line too.

    ``asked``: as :meth:`mendfast.commands.questions.Questions.after` gives it.
    """
    return at_once(_measuring(system, group, asked, **options))


def _measuring(
    system: System,
    group: Sequence[Example],
    asked: dict[str, Any],
    *,
    show: bool = False,
    before: Before | None = None,
    in_turn: bool = False,
    part: int | None = None,
    later: bool = False,
) -> Measuring:
    first, shown = group[0], _to_show(group, asked)
    asked = dict(asked)
    others = [asked.pop(name) for name in ("rephrasings", "locality", "portability")]
    try:
        outcome = yield from measuring(
            system,
            [(example.prompt, example.target) for example in group],
            *others,
            show=shown if show else (),
            before=before,
            in_turn=in_turn,
            part=part,
            later=later,
            **asked,
        )
    except FAILURES as error:
        return {"error": f"{type(error).__name__}: {error}"}
    # JSON has no NaN.
    row: dict[str, Any] = {
        "figures": {name: value if math.isfinite(value) else None for name, value in outcome.figures.items()}
    }
    if len(group) == 1 and outcome.tokens:
        row |= {"tokens": outcome.tokens}
    if in_turn:
        row |= {"right": list(map(int, outcome.right)), "exact": list(map(int, outcome.exact))}
    if show:
        kinds = ["edit", *["rephrasing"] * bool(first.rephrasings), "unrelated"]
        row |= {"shown": [(kind, *rest) for kind, rest in zip(kinds, outcome.shown, strict=False)]}
        row |= {"target": first.target}
    return row


def _to_show(group: Sequence[Example], asked: dict[str, Any]) -> list[str]:
    """Of the first edit itself, a rephrasing, an unrelated question."""
    first = group[0]
    return [first.prompt, *first.rephrasings[:1], *(prompt for prompt, _ in asked["locality"][:1])]


class _Fitting:
    """Trains systems, once for an output directory: ``systems/<key>/`` there."""

    def __init__(self, editor: MendEditor, settings: EvalSettings, read: dict[str, Any], processes: Processes):
        self.editor, self.settings, self.processes = editor, settings, processes
        self.task = load_task(settings.task, settings.train_data, **read)
        tell(self.task.sieve(editor), make_console(quiet=not processes.main))

    def system(self, key: str) -> System:
        """The trained system: what an earlier run kept, or what this one trains, going on where it was cut off."""
        settings, editor = self.settings, self.editor
        options, config = settings.options_of(key)
        torch.manual_seed(settings.seed)
        system = make_system(key, editor.model, editor.tokenizer, editor.config, **options)
        if isinstance(system, Mend) and system.subject.config.aggregation == "least_squares":
            if system.subject.metric is None and editor.metric is not None:
                system.subject.protect_with(editor.metric)
        directory = Path(settings.output) / "systems" / key if settings.output else None
        made = json.loads(json.dumps({"options": options, "config": asdict(config), "data": settings.train_data}))
        if directory and self.processes.most(int((directory / "fitted.json").is_file())):
            fitted = directory / "fitted.json"
            before = check_object(parse_json(read_json_bytes(fitted), str(fitted)), str(fitted))
            trained = check_object(before.get("config"), f"The configuration in {fitted}")
            before["config"] = {**asdict(TrainConfig()), **trained}  # an older one lacks the newer settings
            check_settings(f"{directory} was trained", before, made, "choose another --output.", named=False)
            system.load(directory / "final")
            return system
        system.fit(
            self.task.sampler(settings.seed),
            config,
            output=directory,
            validation=self.task.sampler(settings.seed + 1, held_out=True),
        )
        if directory:
            if (directory / "best").is_dir():
                system.load(directory / "best")
            if self.processes.main:
                system.save(directory / "final")
                atomic_write(directory / "fitted.json", json.dumps(made, indent=2).encode())
        self.processes.most(0)
        return system


def _row(journal: Journal, key: str, size: int, seed: int) -> dict[str, Any]:
    rows = journal.rows(key, size)
    errors = [row["error"] for row in rows if "error" in row]
    summary = summarise([row["figures"] for row in rows if "figures" in row], seed=seed)
    summary |= sequences.by_edit(rows, seed=seed)
    old, lengths = sequences.survival(rows, seed=seed), by_length(rows)
    return {
        **journal.system(key),
        "k": size,
        "measured": len(rows) - len(errors),
        "failed": len(errors),
        "first_error": errors[0] if errors else None,
        "figures": {name: interval.to_dict() for name, interval in summary.items()},
        **({"survival": old} if old else {}),
        **({"lengths": lengths} if lengths else {}),
    }
