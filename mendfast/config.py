"""What an editor is made of: :class:`MendConfig`."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .files import atomic_write, read_json_bytes
from .schema import check_fields, check_object, check_version, parse_json, shown, some
from .types import PRECISIONS

FORMAT_VERSION = 1
SIDES = ("both", "u", "delta", "smaller", "separate")
AGGREGATIONS = ("sum", "least_squares")
REDUCTIONS = ("edit", "batch")
FORMS = ("chat", "plain")
ROWS = ("all", "answers")


@dataclass
class MendConfig:
    """Which matrices are edited, and the shape of the network that edits them (Mitchell et al. 2022)."""

    layers: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the weights to edit; None picks the MLP matrices of the last blocks."},
    )
    rank: int = field(default=1920, metadata={"help": "Rank R of each block; at most D = m + n is used.", "least": 1})
    blocks: int = field(
        default=2, metadata={"help": "Number of low-rank blocks that follow each other.", "least": 1, "most": 128}
    )
    shared: bool = field(default=True, metadata={"help": "One network per weight shape, not per weight."})
    normalize: bool = field(default=True, metadata={"help": "Normalise u and delta by running statistics."})
    identity_init: bool = field(
        default=True,
        metadata={"help": "Residual blocks that start as the identity; False: Xavier, without the residual."},
    )
    sides: str = field(default="both", metadata={"help": f"What the network sees: one of {SIDES}.", "choices": SIDES})
    loss_reduction: str = field(
        default="edit",
        metadata={
            "help": "'edit': mean over each edit's own tokens; 'batch': over all tokens of the batch.",
            "choices": REDUCTIONS,
        },
    )
    precision: str = field(
        default="tf32x3", metadata={"help": f"Arithmetic on matrix units: {PRECISIONS}.", "choices": PRECISIONS}
    )
    step_size: float = field(
        default=1e-4,
        metadata={
            "help": "alpha at initialisation; a learned multiplier per layer, starting at 1, scales it.",
            "least": 0,
        },
    )
    scale_v: bool = field(
        default=False,
        metadata={"help": "Draw V from N(0, 1/D) and not N(0, 1): wants a larger learning rate, trains sooner."},
    )
    chat: bool | str = field(
        default="auto",
        metadata={
            "help": "Prompts go through the tokenizer's chat template, and answers end as it ends them: True, False, "
            "or 'auto': if it has one.",
        },
    )
    forms: list[str] | None = field(
        default=None,
        metadata={
            "help": "Forms that each edit is made in, all together: chat, plain, system:TEXT. None: the one that chat "
            "says."
        },
    )
    rows: str = field(
        default="all",
        metadata={
            "help": "Which tokens an edit is made of: 'all' that the loss reaches (the paper), or 'answers', those "
            "that predict its target: many edits at once leave each other more room under least squares, and are "
            "solved sooner.",
            "choices": ROWS,
        },
    )
    aggregation: str = field(
        default="sum",
        metadata={
            "help": "Simultaneous edits as 'sum' of the separate ones (the paper), or as 'least_squares' under what "
            "is protected.",
            "choices": AGGREGATIONS,
        },
    )
    ridge: float = field(
        default=1e-3, metadata={"help": "lambda at initialisation, in units of tr(C); learned per layer.", "least": 0}
    )
    protection: float = field(
        default=30.0,
        metadata={"help": "mu at initialisation, in rows of protected text; learned per layer.", "least": 0},
    )
    longest: float | None = field(
        default=4.0,
        metadata={
            "help": "Under least squares, inputs longer than so many times the root mean square of those seen want "
            "what they would at that length: a few tokens' are 15 times as long, and would want 200 times the change. "
            "None: all that they want."
        },
    )
    rounds: int = field(
        default=0,
        metadata={
            "help": "Of several edits under least squares, at most so many rounds in which the tokens of answers that "
            "are not told surely enough gain weight, and the others lose it (8 are enough); 0: all weigh the same.",
            "least": 0,
            "most": 100,
        },
    )
    rounds_enough: float = field(
        default=0.003, metadata={"help": "The loss of an answer's token that is sure enough, in nats.", "least": 0}
    )
    rounds_enough_beside: float = field(
        default=0.3,
        metadata={
            "help": "The same in an edit's forms beside the first: rows of plain text are most like running text, and "
            "half of what many edits do to it is theirs.",
            "least": 0,
        },
    )
    rounds_protection: float = field(default=20.0, metadata={"help": "Where rounds are taken, times mu.", "least": 0})
    protect_rank: int | None = field(
        default=None,
        metadata={"help": "Leading directions of protected text that are kept; None: all of them.", "least": 1},
    )
    prompt_template: str = field(
        default="{prompt}", metadata={"help": "What the model reads; {prompt} stands for the prompt."}
    )
    separator: str = field(default=" ", metadata={"help": "Text between prompt and target."})
    append_eos: bool = field(
        default=False, metadata={"help": "Let a target end in the end-of-sequence token (decoder-only models)."}
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.chat not in (True, False, "auto"):
            raise ValueError(f"chat is {shown(self.chat)}; it must be True, False or 'auto'.")
        if self.forms is not None:
            unknown = [form for form in self.forms if form not in FORMS and not form.startswith("system:")]
            if unknown or not self.forms or len(set(self.forms)) < len(self.forms):
                raise ValueError(f"forms is {shown(self.forms)}; name chat, plain or system:TEXT, each once, or None.")
        if self.layers is not None:
            if not self.layers:
                raise ValueError("layers is empty; name at least one weight, or pass None to have them chosen.")
            counts = Counter(self.layers)
            if repeated := sorted(name for name, count in counts.items() if count > 1):
                raise ValueError(f"layers names {some(repeated)} more than once; name each weight once.")
        if self.aggregation == "least_squares" and not (self.ridge > 0 and self.protection > 0):
            raise ValueError(
                f"ridge is {self.ridge} and protection {self.protection}; under least squares both must be above 0."
            )
        if self.longest is not None and not self.longest > 0:
            raise ValueError(f"longest is {self.longest}; it must be above 0, or None.")
        if not self.rounds_protection > 0:
            raise ValueError(f"rounds_protection is {self.rounds_protection}; it must be above 0.")
        if "{prompt}" not in self.prompt_template:
            raise ValueError(f"prompt_template is {shown(self.prompt_template)}; it must contain {{prompt}}.")

    def to_dict(self) -> dict[str, Any]:
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MendConfig:
        """The inverse of :meth:`to_dict`. Unknown keys, as a later version may write, are warned of.

        Raises:
            ValueError, TypeError: a newer ``format_version``; a value of another type or outside its range.
        """
        check_version(check_object(values, "The configuration").get("format_version"), FORMAT_VERSION, "It")
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known - {"format_version"})
        if unknown:
            warnings.warn(
                f"The configuration holds {some(unknown)}, which this version of mendfast does not know; "
                "ignored. A newer mendfast may have written it.",
                stacklevel=2,
            )
        # Editors from before there was a choice were trained on plain prompts, and on rows of any length; their rounds
        # asked the same of all forms.
        enough = values.get("rounds_enough", cls.rounds_enough_beside)
        before = {"chat": False, "longest": None, "rounds_enough_beside": enough}
        return cls(**{**before, **{k: v for k, v in values.items() if k in known}})

    def save(self, path: str | Path) -> None:
        atomic_write(path, json.dumps(self.to_dict(), indent=2).encode() + b"\n")

    @classmethod
    def load(cls, path: str | Path) -> MendConfig:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no configuration of mendfast, or one that this version does not take.
        """
        values = parse_json(read_json_bytes(path), str(path))
        try:
            return cls.from_dict(values)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is no configuration that mendfast takes. {error}") from error
