"""``mendfast eval``: systems side by side on one task, resumable, with a report."""

from __future__ import annotations

import inspect
import json
import math
import platform
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from tqdm import tqdm

from ..baselines import SYSTEMS, System, make_system
from ..baselines.fine_tuning import FineTuning
from ..baselines.measure import Before, measure, summarise
from ..baselines.mend import Mend
from ..editor import MendEditor
from ..files import atomic_write, read_json_bytes
from ..schema import check_object, check_settings, parse_json, shown
from ..tasks.load import TASKS, load_task
from ..tasks.records import Example, Problem
from ..tasks.task import usable
from ..training import TrainConfig
from ..training.config import MOST_EDITS
from . import sequences
from .console import make_console, text
from .doctor import device_name
from .eval_report import caption, console_table, write_report
from .journal import Journal
from .loading import EditorSettings, load_editor
from .outputs import check_directory
from .questions import Questions

TABLES = {
    "systems": ("mend", "enn", "ke", "ft", "ft_kl", "identity"),
    "variants": ("mend", *(key for key, system in SYSTEMS.items() if key.startswith("mend_") and system.fitted)),
    "batched": (
        "mend", "mend_sum", "malmen", "ultraedit", "ft", "ft_one_layer", "ft_breadth_first", "ft_kl", "enn",
    ),
    "sequential": (
        "mend", "mend_sum", "malmen", "ultraedit", "ft", "ft_one_layer", "ft_breadth_first", "ft_kl", "enn",
    ),
}  # fmt: skip
SIZES = {"batched": (1, 5, 25, 75, 125), "sequential": sequences.SIZES}
SEQUENCES = 3
SHOWN = 8  # edits whose answers before and after go into the report
FITTED_WITH = (
    "steps", "batch_size", "joint", "learning_rate", "alpha_learning_rate", "c_edit", "validate_every", "patience",
)  # fmt: skip
"""Options of :class:`TrainConfig` that the command takes."""


SEEDS = {"least": 0, "most": 2**63 - 1}
"""What every generator takes."""


@dataclass(kw_only=True)
class EvalSettings(EditorSettings):
    """What ``mendfast eval`` is asked."""

    task: str = field(default="qa", metadata={"help": "what is edited", "choices": TASKS})
    table: str = field(
        default="systems", metadata={"help": "which systems are compared", "choices": tuple(TABLES)}
    )
    data: str = field(metadata={"help": "edits: a file or Hub name, or world:test"})
    known: str | None = field(
        default=None, metadata={"help": "what must stay as it is; default: the edits' own locality, or each other"}
    )
    limit: int | None = field(default=None, metadata={"help": "the first so many edits", "least": 1})
    unrelated: int = field(default=64, metadata={"help": "known questions asked after each edit", "least": 0})
    systems: list[str] | None = field(
        default=None, metadata={"help": "what to compare; default: the table's", "metavar": "KEY"}
    )
    sizes: list[int] | None = field(
        default=None,
        metadata={
            "help": "edits at once (batched: 1 5 25 75 125), or one after the other (sequential: 1 10 100 1000)",
            "least": 1,
            "most": MOST_EDITS,
        },
    )
    sequences: int = field(
        default=SEQUENCES, metadata={"help": "sequences of each size, of other edits, as far as they go", "least": 1}
    )
    text: str | None = field(
        default=None,
        metadata={
            "help": "running text, a file or Hub name, whose perplexity an edit should not raise; default: none, "
            "but of the table sequential the model's own words"
        },
    )
    output: str | None = field(
        default=None, metadata={"help": "keep measured edits, trained systems and the report there", "metavar": "DIR"}
    )
    fine_tuning_rate: float = field(default=3e-3, metadata={"help": "Adam's rate for fine-tuning", "least": 0})
    train_data: str | None = field(
        default=None, metadata={"help": "data for systems that are trained: ENN, KE, FT+KL, MEND's variants"}
    )
    seed: int = field(default=0, metadata={"help": "of draws, training and intervals", **SEEDS})
    option: list[str] = field(
        default_factory=list,
        metadata={"help": "as enn.steps=2; may be repeated", "metavar": "SYSTEM.NAME=VALUE", "repeat": True},
    )
    training: TrainConfig = field(default_factory=TrainConfig, metadata={"only": FITTED_WITH})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.training = replace(self.training, seed=self.seed)
        self.chosen_systems()
        if self.table not in SIZES and self.sizes is not None:
            raise ValueError(
                f"--sizes are of the table batched, and --table is {self.table}; take batched or sequential, or leave "
                "--sizes out."
            )
        if self.table != "sequential" and self.sequences != SEQUENCES:
            raise ValueError(
                f"--sequences are of the table sequential, and --table is {self.table}; leave one of them out."
            )
        for key in dict.fromkeys(_parsed(given)[0] for given in self.option):
            self.options_of(key)
        check_directory("--output", self.output)

    def chosen_systems(self) -> tuple[list[str], list[str]]:
        """The systems to measure, and those of the table that there is no training data for."""
        keys = list(self.systems or TABLES[self.table])
        if unknown := [key for key in keys if key not in SYSTEMS]:
            raise ValueError(f"System {shown(unknown[0])} is unknown; choose from {', '.join(SYSTEMS)}.")
        missing = [] if self.train_data is not None else [key for key in keys if is_fitted(key, self.table)]
        kept = [key for key in keys if key not in missing]
        if missing and (self.systems or self.table == "variants"):
            raise ValueError(
                f"{', '.join(missing)} must be trained first; pass --train-data, and --output to keep them."
            )
        return list(dict.fromkeys(kept)), missing

    def sizes_for(self, examples: int) -> list[int]:
        """How many edits at once, or in turn, are measured, where there are so many examples."""
        wanted = self.sizes or SIZES.get(self.table, (1,))
        if self.table == "sequential":
            return sequences.sizes_for(wanted, examples)
        if not (found := [size for size in wanted if size <= examples]):
            raise ValueError(f"There are {examples} edits, fewer than --sizes {self.sizes}; pass smaller ones.")
        return found

    def groups(self, size: int, examples: int) -> int:
        """How many groups of so many edits are measured."""
        return min(examples // size, self.sequences) if self.table == "sequential" else examples // size

    def options_of(self, key: str) -> tuple[dict[str, Any], TrainConfig]:
        """What a system is made with, and trained by, --option included."""
        made = {"learning_rate": self.fine_tuning_rate} if issubclass(SYSTEMS[key], FineTuning) else {}
        accepted = _accepted(key)
        training = {f.name: f for f in fields(TrainConfig)}
        changed: dict[str, Any] = {}
        for given in self.option:
            system, name, value = _parsed(given)
            if system != key:
                continue
            if name in accepted:
                made[name] = _held_to(accepted[name], value, given)
            elif name in training:
                changed[name] = value
            else:
                known = ", ".join(sorted({*accepted, *training}))
                raise ValueError(f"{key} has no option {shown(name)}; it has {known}.")
        return made, replace(self.training, **changed)

    def in_common(self) -> dict[str, Any]:
        """What two parts of one evaluation must have in common."""
        names = ("table", "model", "editor", "dtype", "quantize", "revision", "data", "known", "limit", "unrelated")
        names += ("text", "seed", "train_data", "fine_tuning_rate", "option")
        trained = {name: getattr(self.training, name) for name in FITTED_WITH}
        return {"task": self.task, **{name: getattr(self, name) for name in names}, **trained}


def _parsed(given: str) -> tuple[str, str, Any]:
    """System, name and value of an --option."""
    name, found, value = given.partition("=")
    system, _, name = name.partition(".")
    if not found or system not in SYSTEMS:
        raise ValueError(f"--option {shown(given)} is not SYSTEM.NAME=VALUE with a system of {', '.join(SYSTEMS)}.")
    try:
        return system, name, parse_json(value, "it")
    except ValueError:
        raise ValueError(f"--option {shown(given)}: the value is no number, true, false or list.") from None


def _accepted(key: str) -> dict[str, Any]:
    """The options of a system's constructor, and their defaults."""
    taken = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(SYSTEMS[key]).parameters.items()
    return {name: p.default for name, p in parameters if name != "subject" and p.kind in taken}


def _held_to(default: Any, value: Any, given: str) -> Any:
    """A value of the kind that the option's default has."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(default, bool):
        kind, good = "true or false", isinstance(value, bool)
    elif isinstance(default, int):
        least = min(default, 1)
        kind, good = f"a whole number from {least}", number and isinstance(value, int) and least <= value < 2**63
    elif isinstance(default, float):
        kind, good = "a finite number from 0", number and 0 <= value < math.inf
    else:
        return value
    if not good:
        raise ValueError(f"--option {shown(given)}: the value must be {kind}; the default is {default}.")
    return value


def compare(settings: EvalSettings) -> dict[str, Any]:
    """What the command does; see :func:`evaluate`."""
    return evaluate(load_editor(settings), settings)


def evaluate(editor: MendEditor, settings: EvalSettings) -> dict[str, Any]:
    """What the command does; returns what ``results.json`` holds.

    Raises:
        ValueError, FileNotFoundError: an unknown system, data that can't be read or that the model can't serve,
            systems that need training without --train-data, an output directory of another evaluation.
    """
    console = make_console()
    keys, left_out = settings.chosen_systems()
    if left_out:
        console.print(f"Left out, since they are trained first (--train-data): {', '.join(left_out)}.")
    read = {"seed": settings.seed, "tokenizer": editor.tokenizer}
    task = load_task(settings.task, settings.data, limit=settings.limit, **read)
    task.check(editor.model, editor.kind)
    examples, refused = usable(editor, task.examples)
    problems = [*task.problems, *refused]
    tell(problems, console)
    if not examples:
        raise ValueError(f"The model can be asked none of the {len(task.examples)} edits; the first: {refused[0]}")
    sizes = settings.sizes_for(len(examples))
    own_text = settings.table == "sequential"
    questions = Questions(editor, task, settings.known, settings.unrelated, settings.text, own_text, **read)
    fitting = _Fitting(editor, settings, read) if settings.train_data is not None else None
    journal = Journal(settings.output, settings.in_common())
    started = time.perf_counter()
    before: Before | None = None
    for key in keys:
        before = _evaluate_system(key, editor, fitting, journal, examples, questions, sizes, settings, before)
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
        "read": len(task.examples),
        "problems": [str(problem) for problem in problems],
        "seconds": round(time.perf_counter() - started, 1),
        "environment": _environment(editor),
        "rows": rows,
        "examples": journal.shown(keys, sizes[0]),
    }
    console.print(text(caption(result)), soft_wrap=True)
    console.print(console_table(result))
    if settings.output:
        console.print(text(f"Report: {write_report(settings.output, result)}"))
    return result


def is_fitted(key: str, table: str) -> bool:
    """Whether the command trains the system. Among its variants MEND is trained as long as they are."""
    return SYSTEMS[key].fitted and (key != "mend" or table == "variants")


def tell(problems: Sequence[Problem], console: Console) -> None:
    """Print the first problems, and how many there are."""
    for problem in problems[:5]:
        console.print(text((str(problem), "yellow")))
    if len(problems) > 5:
        flagged = sum(problem.kept for problem in problems)
        console.print(f"[yellow]in all {len(problems) - flagged} problems, and {flagged} flagged and kept[/]")


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
    questions: Questions,
    sizes: Sequence[int],
    settings: EvalSettings,
    before: Before | None,
) -> Before | None:
    """Measure what the journal lacks; returns what is known of the unedited model, for the next system."""
    groups = {size: settings.groups(size, len(examples)) for size in sizes}
    if journal.has_system(key) and all((key, k, i) in journal for k in sizes for i in range(groups[k])):
        return before
    system = _prepare(key, editor, fitting, settings)
    system.subjects = {example.prompt: example.subject for example in examples if example.subject}
    journal.add_system(system)
    if before is None or not before.serves(system.subject):
        before = Before(system.subject, questions.texts())
    in_turn = settings.table == "sequential"
    for size in sizes:
        many = f"{system.name}, {size} {'in turn' if in_turn else 'at once'}" if size > 1 else system.name
        bar = tqdm(range(groups[size]), many, disable=None)
        for i in bar:
            if (key, size, i) not in journal:
                group = [part for example in examples[i * size : (i + 1) * size] for part in example.parts]
                rng = random.Random(f"{settings.seed}:{size}:{i}")
                asked = questions.after(group, rng, brief=in_turn)
                show = i < SHOWN and size == sizes[0]
                row = measure_group(system, group, asked, show=show, before=before, in_turn=in_turn)
                journal.add({"system": key, "k": size, "group": i, **row})
            bar.set_postfix(journal.running(key, size))
    return before


def measure_group(
    system: System,
    group: Sequence[Example],
    asked: dict[str, Any],
    *,
    show: bool = False,
    before: Before | None = None,
    in_turn: bool = False,
) -> dict[str, Any]:
    """One edit by all of ``group`` as a line of the journal; an edit that fails is a line too.

    ``asked``: as :meth:`mendfast.commands.questions.Questions.after` gives it.
    """
    first = group[0]
    asked = dict(asked)
    others = [asked.pop(name) for name in ("rephrasings", "locality", "portability")]
    shown = [first.prompt, *first.rephrasings[:1], *(prompt for prompt, _ in others[1][:1])]
    try:
        outcome = measure(
            system,
            [(example.prompt, example.target) for example in group],
            *others,
            show=shown if show else (),
            before=before,
            in_turn=in_turn,
            **asked,
        )
    except (ValueError, RuntimeError, ArithmeticError) as error:  # of the data, of memory: not of the program
        return {"error": f"{type(error).__name__}: {error}"}
    # JSON has no NaN.
    row: dict[str, Any] = {
        "figures": {name: value if math.isfinite(value) else None for name, value in outcome.figures.items()}
    }
    if in_turn:
        row |= {"right": list(map(int, outcome.right)), "exact": list(map(int, outcome.exact))}
    if show:
        kinds = ["edit", *["rephrasing"] * bool(first.rephrasings), "unrelated"]
        row |= {"shown": [(kind, *rest) for kind, rest in zip(kinds, outcome.shown, strict=False)]}
        row |= {"target": first.target}
    return row


def _prepare(key: str, editor: MendEditor, fitting: _Fitting | None, settings: EvalSettings) -> System:
    if is_fitted(key, settings.table):
        return fitting.system(key)
    if issubclass(SYSTEMS[key], Mend):
        return SYSTEMS[key].of(editor)
    options, _ = settings.options_of(key)
    return make_system(key, editor.model, editor.tokenizer, editor.config, **options)


class _Fitting:
    """Trains systems, once for an output directory: ``systems/<key>/`` there."""

    def __init__(self, editor: MendEditor, settings: EvalSettings, read: dict[str, Any]):
        self.editor, self.settings = editor, settings
        self.task = load_task(settings.task, settings.train_data, **read)
        tell(self.task.sieve(editor), make_console())

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
        if directory and (directory / "fitted.json").is_file():
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
            system.save(directory / "final")
            atomic_write(directory / "fitted.json", json.dumps(made, indent=2).encode())
        return system


def _row(journal: Journal, key: str, size: int, seed: int) -> dict[str, Any]:
    rows = journal.rows(key, size)
    errors = [row["error"] for row in rows if "error" in row]
    summary = summarise([row["figures"] for row in rows if "figures" in row], seed=seed)
    summary |= sequences.by_edit(rows, seed=seed)
    old = sequences.survival(rows, seed=seed)
    return {
        **journal.system(key),
        "k": size,
        "measured": len(rows) - len(errors),
        "failed": len(errors),
        "first_error": errors[0] if errors else None,
        "figures": {name: interval.to_dict() for name, interval in summary.items()},
        **({"survival": old} if old else {}),
    }
