"""What an editor is made of: :class:`MendConfig`."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .files import atomic_write
from .types import PRECISIONS

FORMAT_VERSION = 1
SIDES = ("both", "u", "delta", "smaller", "separate")
REDUCTIONS = ("edit", "batch")


@dataclass
class MendConfig:
    """Which matrices are edited, and the shape of the network that edits them (Mitchell et al. 2022)."""

    layers: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the weights to edit; None picks the MLP matrices of the last blocks."},
    )
    rank: int = field(default=1920, metadata={"help": "Rank R of each block; at most D = m + n is used."})
    blocks: int = field(default=2, metadata={"help": "Number of low-rank blocks that follow each other."})
    shared: bool = field(default=True, metadata={"help": "One network per weight shape, not per weight."})
    normalize: bool = field(default=True, metadata={"help": "Normalise u and delta by running statistics."})
    identity_init: bool = field(
        default=True,
        metadata={"help": "Residual blocks that start as the identity; False: Xavier, without the residual."},
    )
    sides: str = field(default="both", metadata={"help": f"What the network sees: one of {SIDES}."})
    loss_reduction: str = field(
        default="edit",
        metadata={"help": "'edit': mean over each edit's own tokens; 'batch': over all tokens of the batch."},
    )
    precision: str = field(default="tf32x3", metadata={"help": f"Arithmetic on matrix units: {PRECISIONS}."})
    step_size: float = field(
        default=1e-4,
        metadata={"help": "alpha at initialisation; a learned multiplier per layer, starting at 1, scales it."},
    )
    scale_v: bool = field(
        default=False,
        metadata={"help": "Draw V from N(0, 1/D) and not N(0, 1): wants a larger learning rate, trains sooner."},
    )
    prompt_template: str = field(
        default="{prompt}", metadata={"help": "What the model reads; {prompt} stands for the prompt."}
    )
    separator: str = field(default=" ", metadata={"help": "Text between prompt and target."})
    append_eos: bool = field(
        default=False, metadata={"help": "Let a target end in the end-of-sequence token (decoder-only models)."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.layers, str):
            raise TypeError(f"layers is the string {self.layers!r}; pass a list of weight names.")
        if self.layers is not None:
            self.layers = list(self.layers)
            if not self.layers:
                raise ValueError("layers is empty; name at least one weight, or pass None to have them chosen.")
            if repeated := sorted({name for name in self.layers if self.layers.count(name) > 1}):
                raise ValueError(f"layers names {', '.join(repeated)} more than once; name each weight once.")
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}; it must be at least 1.")
        if self.blocks < 1:
            raise ValueError(f"blocks is {self.blocks}; it must be at least 1.")
        for name, value, allowed in (
            ("sides", self.sides, SIDES),
            ("precision", self.precision, PRECISIONS),
            ("loss_reduction", self.loss_reduction, REDUCTIONS),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; choose one of {', '.join(allowed)}.")
        if "{prompt}" not in self.prompt_template:
            raise ValueError(f"prompt_template is {self.prompt_template!r}; it must contain {{prompt}}.")

    def to_dict(self) -> dict[str, Any]:
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MendConfig:
        """The inverse of :meth:`to_dict`. Unknown keys, as a later version may write, are warned of."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known - {"format_version"})
        if unknown:
            warnings.warn(
                f"The configuration holds {', '.join(unknown)}, which this version of mendfast does not know; "
                "ignored. A newer mendfast may have written it.",
                stacklevel=2,
            )
        return cls(**{k: v for k, v in values.items() if k in known})

    def save(self, path: str | Path) -> None:
        atomic_write(path, json.dumps(self.to_dict(), indent=2).encode() + b"\n")

    @classmethod
    def load(cls, path: str | Path) -> MendConfig:
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not a configuration of mendfast: {error}.") from error
