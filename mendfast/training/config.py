"""How a learner is trained: :class:`TrainConfig`."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from ..schema import check_fields
from ..types import C_EDIT
from .precision import PRECISIONS

MOST_EDITS = 1 << 16
"""At once; no memory takes more."""


@dataclass
class TrainConfig:
    """How an editor is trained. Fields whose metadata say "free" may be others when a run goes on."""

    steps: int = field(default=1000, metadata={"help": "Optimiser steps.", "free": True, "most": 10**9})
    batch_size: int = field(
        default=16, metadata={"help": "Independent edits per step, B, of all processes.", "most": MOST_EDITS}
    )
    accumulate: int = field(
        default=1,
        metadata={"help": "Parts that a step's edits go through the model in, to save memory.", "most": MOST_EDITS},
    )
    checkpoint_activations: bool = field(
        default=False,
        metadata={"help": "Compute the edited blocks again in the backward pass, to save memory.", "free": True},
    )
    cache_bytes: int = field(
        default=1 << 30,
        metadata={
            "help": "Bytes for what the blocks below the edits give for each text; 0 = run them.",
            "least": 0,
            "free": True,
        },
    )
    cache_disk_bytes: int = field(
        default=0,
        metadata={"help": "Bytes of those to keep on disk, where memory is full; 0 = none.", "least": 0, "free": True},
    )
    prefill: bool = field(
        default=False,
        metadata={"help": "Compute those of all steps before the first one, with a progress bar.", "free": True},
    )
    loc_positions: int = field(
        default=0, metadata={"help": "Positions of a locality text to compare, drawn each step; 0 = all.", "least": 0}
    )
    loc_answers: bool = field(
        default=False, metadata={"help": "Compare locality texts only where their answers are predicted."}
    )
    loc_root: bool = field(
        default=False,
        metadata={
            "help": "Of each position's KL the root of its half, a bound on the probability that moves: a few large "
            "ones outweigh many small ones less.",
        },
    )
    precision: str = field(
        default="float32",
        metadata={
            "help": "Of the edited blocks' products; the editor's are float32's.",
            "choices": PRECISIONS,
        },
    )
    joint: list[int] = field(
        default_factory=lambda: [1],
        metadata={"help": "Sizes of simultaneous edits, drawn at random each step; 1 = alone.", "most": MOST_EDITS},
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "Adam's rate for the editor network.", "least": 0})
    alpha_learning_rate: float = field(default=1e-2, metadata={"help": "Adam's rate for the step sizes.", "least": 0})
    calibrate: bool = field(
        default=False,
        metadata={
            "help": "Start from the step size, of 13 from 1e-6 to 1, with the least loss on a few draws (of a "
            "classifier: of those that leave other answers nearly alone)."
        },
    )
    warmup: int = field(default=20, metadata={"help": "Steps of linear warm-up.", "least": 0})
    final_rate: float = field(default=0.05, metadata={"help": "The rate decays linearly to this share.", "least": 0})
    clip: float = field(default=1.0, metadata={"help": "Largest norm of the gradient.", "least": 0})
    c_edit: float = field(default=C_EDIT, metadata={"help": "Weight of the edit's loss (the paper: 0.1).", "least": 0})
    c_loc: float = field(default=1.0, metadata={"help": "Weight of the locality loss.", "least": 0})
    c_loc_decay: float = field(
        default=0.0,
        metadata={
            "help": "Of n edits at once c_loc is divided by n to this power: one alone can stay nearer to nothing.",
            "least": 0,
        },
    )
    validate_every: int = field(
        default=200, metadata={"help": "Steps between validations; 0 = never.", "least": 0, "free": True}
    )
    validation_size: int = field(default=64, metadata={"help": "Edits in a validation.", "most": 1 << 20})
    patience: int = field(
        default=0,
        metadata={"help": "Stop after so many validations without a better loss; 0 = never.", "least": 0, "free": True},
    )
    checkpoint_every: int = field(default=200, metadata={"help": "Steps between checkpoints.", "free": True})
    checkpoint_minutes: float = field(
        default=10.0,
        metadata={"help": "Minutes between checkpoints, beside those; 0 = never by time.", "least": 0, "free": True},
    )
    seed: int = field(default=0, metadata={"help": "Of the data order."})

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("steps", "batch_size", "accumulate", "validation_size", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if not self.joint or min(self.joint) < 1:
            raise ValueError(f"joint is {self.joint}; it must be a list of sizes of at least 1.")

    def groups(self, joint: int) -> int:
        """The edits of a step whose edits are ``joint`` at once."""
        return max(1, self.batch_size // joint)

    def locality_weight(self, joint: int) -> float:
        """Of ``joint`` edits at once."""
        return self.c_loc / joint**self.c_loc_decay

    def joint_size(self, step: int) -> int:
        """How many edits at once step ``step`` trains."""
        return random.Random(f"{self.seed}:{step}:joint").choice(self.joint)

    def rate(self, step: int) -> float:
        """The share of the learning rates that step ``step`` moves with."""
        decay = 1 - (1 - self.final_rate) * step / max(1, self.steps)
        return min((step + 1) / max(1, self.warmup), 1.0) * decay
