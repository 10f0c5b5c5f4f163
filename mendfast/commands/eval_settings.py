"""What ``mendfast eval`` is asked: which systems, on which edits, and by which rates."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..baselines import SYSTEMS
from ..baselines.fine_tuning import FineTuning
from ..schema import parse_json, shown
from ..tasks.load import TASKS
from ..training import TrainConfig
from ..training.config import MOST_EDITS
from . import sequences
from .loading import EditorSettings
from .outputs import check_directory
from .questions import PART

TABLES = {
    "systems": (
        "mend", "mend_sum", "malmen", "enn", "ke", "ultraedit", "ft", "ft_one_layer", "ft_breadth_first", "ft_kl",
        "lora", "in_context", "rome", "memit", "identity",
    ),
    "variants": ("mend", *(key for key, system in SYSTEMS.items() if key.startswith("mend_") and system.fitted)),
    "batched": (
        "mend", "mend_sum", "malmen", "ultraedit", "ft", "ft_one_layer", "ft_breadth_first", "ft_kl", "memit", "enn",
    ),
    "sequential": (
        "mend", "mend_sum", "malmen", "ultraedit", "ft", "ft_one_layer", "ft_breadth_first", "ft_kl", "enn",
    ),
}  # fmt: skip
SIZES = {"batched": (1, 5, 25, 75, 125), "sequential": sequences.SIZES}
SEQUENCES = 3
FITTED_WITH = (
    "steps", "batch_size", "joint", "learning_rate", "alpha_learning_rate", "c_edit", "validate_every", "patience",
)  # fmt: skip
"""Options of :class:`TrainConfig` that the command takes."""


SEEDS = {"least": 0, "most": 2**63 - 1}
"""What every generator takes."""


def _written(name: str) -> bool:
    """Whether an evaluation writes a file of that name into its output directory."""
    return fnmatch(name, "edits*.jsonl") or name in ("settings.json", "results.json", "table.csv", "table.md")


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
    unrelated: int = field(default=8, metadata={"help": "known questions asked after each edit", "least": 0})
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
    fine_tuning_rate: float | None = field(
        default=None, metadata={"help": "Adam's rate for fine-tuning; default: chosen, see --validation", "least": 0}
    )
    validation: int = field(
        default=25,
        metadata={
            "help": "edits of --data, measured in no row, that fine-tuning's and UltraEdit's rates and steps and "
            "MEMIT's weight of C are chosen on; 0: none, each takes its own default",
            "least": 0,
        },
    )
    train_data: str | None = field(
        default=None, metadata={"help": "data for systems that are trained: ENN, KE, MALMEN, FT+KL, MEND's variants"}
    )
    harness: list[str] | None = field(
        default=None,
        metadata={
            "help": "tasks of lm-evaluation-harness, by name or YAML file, to ask before and after an edit of each "
            "system (the first of the most edits)",
            "metavar": "TASK",
        },
    )
    harness_limit: int | None = field(
        default=None, metadata={"help": "documents of each --harness task; default: all", "least": 1}
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
        if self.harness_limit is not None and not self.harness:
            raise ValueError("--harness-limit is of --harness, which names no task; pass both, or neither.")
        if self.harness and find_spec("lm_eval") is None:
            raise ValueError("--harness needs lm-evaluation-harness: pip install lm-eval (mendfast[harness] has it).")
        check_directory("--output", self.output)
        if self.output is not None:
            for name in ("data", "known", "train_data", "text"):
                path = Path(getattr(self, name) or "")
                if path.is_file() and path.resolve().parent == Path(self.output).resolve() and _written(path.name):
                    raise ValueError(
                        f"--output is where --{name.replace('_', '-')} lies, and "
                        f"{path.name} is a name that is written there; choose another directory."
                    )

    def chosen_systems(self) -> tuple[list[str], dict[str, str]]:
        """The systems to measure, and those of the table that are left out, with the reason."""
        keys = list(self.systems or TABLES[self.table])
        if unknown := [key for key in keys if key not in SYSTEMS]:
            raise ValueError(f"System {shown(unknown[0])} is unknown; choose from {', '.join(SYSTEMS)}.")
        missing = [] if self.train_data is not None else [key for key in keys if is_fitted(key, self.table)]
        if missing and (self.systems or self.table == "variants"):
            raise ValueError(
                f"{', '.join(missing)} must be trained first; pass --train-data, and --output to keep them."
            )
        left_out = {key: "it is trained first (--train-data)" for key in missing}
        if not self.systems and find_spec("peft") is None:
            left_out |= {key: "it needs peft (pip install peft)" for key in keys if key == "lora"}
        return list(dict.fromkeys(key for key in keys if key not in left_out)), left_out

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
        made: dict[str, Any] = {}
        if self.fine_tuning_rate is not None and issubclass(SYSTEMS[key], FineTuning):
            made["learning_rate"] = self.fine_tuning_rate
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
        names += ("text", "seed", "train_data", "fine_tuning_rate", "validation", "option", "harness", "harness_limit")
        trained = {name: getattr(self.training, name) for name in FITTED_WITH}
        # an older evaluation, whose every edit read all of the text, is not gone on with
        part = PART if self.text and self.table != "sequential" else None
        return {"task": self.task, **{name: getattr(self, name) for name in names}, **trained, "text_part": part}


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


def is_fitted(key: str, table: str) -> bool:
    """Whether the command trains the system. Among its variants MEND is trained as long as they are."""
    return SYSTEMS[key].fitted and (key != "mend" or table == "variants")
