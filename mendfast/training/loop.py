"""The meta-training loop: steps, validation, checkpoints, exact resume."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from ..editor import MendEditor
from ..files import atomic_write
from ..metrics import Score
from ..objective import Batch
from ..schema import check_fields
from . import checkpoint
from .data import FactSampler
from .memory import peak_bytes, predict, reset_peak
from .meta import meta_loss
from .processes import Processes, launched
from .record import Record
from .report import write_report

if TYPE_CHECKING:
    from accelerate import Accelerator

MAX_SKIPPED_IN_A_ROW = 10
CHECKPOINT = "checkpoint.safetensors"


@dataclass
class TrainConfig:
    """How an editor is trained."""

    steps: int = field(default=1000, metadata={"help": "Optimiser steps."})
    batch_size: int = field(default=16, metadata={"help": "Independent edits per step, B, of all processes."})
    accumulate: int = field(
        default=1, metadata={"help": "Parts that a step's edits go through the model in, to save memory."}
    )
    checkpoint_activations: bool = field(
        default=False, metadata={"help": "Compute the edited blocks again in the backward pass, to save memory."}
    )
    joint: list[int] = field(
        default_factory=lambda: [1],
        metadata={"help": "Sizes of simultaneous edits, drawn at random each step; 1 = alone."},
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "Adam's rate for the editor network.", "least": 0})
    alpha_learning_rate: float = field(default=1e-2, metadata={"help": "Adam's rate for the step sizes.", "least": 0})
    warmup: int = field(default=20, metadata={"help": "Steps of linear warm-up.", "least": 0})
    final_rate: float = field(default=0.05, metadata={"help": "The rate decays linearly to this share.", "least": 0})
    clip: float = field(default=1.0, metadata={"help": "Largest norm of the gradient.", "least": 0})
    c_edit: float = field(default=1.0, metadata={"help": "Weight of the edit's loss (the paper: 0.1).", "least": 0})
    c_loc: float = field(default=1.0, metadata={"help": "Weight of the locality loss.", "least": 0})
    validate_every: int = field(default=200, metadata={"help": "Steps between validations; 0 = never.", "least": 0})
    validation_size: int = field(default=64, metadata={"help": "Edits in a validation."})
    patience: int = field(
        default=0, metadata={"help": "Stop after so many validations without a better loss; 0 = never.", "least": 0}
    )
    checkpoint_every: int = field(default=200, metadata={"help": "Steps between checkpoints."})
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

    def joint_size(self, step: int) -> int:
        """How many edits at once step ``step`` trains."""
        return self.joint[hash((self.seed, step)) % len(self.joint)]

    def rate(self, step: int) -> float:
        """The share of the learning rates that step ``step`` moves with."""
        decay = 1 - (1 - self.final_rate) * step / max(1, self.steps)
        return min((step + 1) / max(1, self.warmup), 1.0) * decay


class TrainingError(RuntimeError):
    """The run can't go on; the last good checkpoint is in place."""


class Trainer:
    """Trains ``editor`` on what ``sampler`` draws.

    Args:
        output: a directory for ``last/`` and ``best/`` (editors as ``save_pretrained`` writes them, with the
            optimiser's state beside the last), ``metrics.jsonl``, and at the end ``curves.png`` and ``report.html``;
            None keeps everything in memory.
        validation: draws for the loss of Algorithm 1 that the best editor and ``patience`` go by.
        score: scores the editor as it is, for the record.
        tensorboard: write events to ``output/tensorboard`` too.
        accelerator: of a run in several processes; by default made when torchrun or accelerate has launched them.
            Each takes its share of every step's edits, so that the steps are those of one process that takes all;
            the first writes the files.

    A step whose loss or gradient is not finite is skipped and counted; ten in a row stop the run.

    Raises:
        ValueError: a step's edits can't be divided evenly by processes and ``accumulate``.
    """

    def __init__(
        self,
        editor: MendEditor,
        sampler: FactSampler,
        config: TrainConfig,
        *,
        output: str | Path | None = None,
        validation: FactSampler | None = None,
        score: Callable[[MendEditor], Score] | None = None,
        progress: bool = True,
        tensorboard: bool = False,
        accelerator: Accelerator | None = None,
    ):
        self.editor, self.sampler, self.config = editor, sampler, config
        self.output = Path(output) if output is not None else None
        self.validation, self.score = validation, score
        self.processes = Processes(accelerator or launched())
        self.progress = progress and self.processes.main
        self._record = Record(self.output if self.processes.main else None, tensorboard and self.processes.main)
        parts = self.processes.count * config.accumulate
        for joint in config.joint:
            if config.groups(joint) % parts:
                raise ValueError(
                    f"batch_size {config.batch_size} makes {config.groups(joint)} edits of {joint} at once, which "
                    f"{self.processes.count} processes and accumulate {config.accumulate} can't share evenly; use a "
                    f"batch_size that is a multiple of {joint * parts}."
                )
        self.step, self.skipped, self.best, self.stale = 0, 0, math.inf, 0
        networks = [p for name, p in editor.named_parameters() if name != "alpha_multiplier"]
        self.optimizer = torch.optim.Adam(
            [
                {"params": networks, "lr": config.learning_rate},
                {"params": [editor.alpha_multiplier], "lr": config.alpha_learning_rate},
            ],
            fused=editor.device.type in ("cpu", "cuda"),  # in place: no temporaries of the parameters' size
        )
        self._rates = [group["lr"] for group in self.optimizer.param_groups]

    def plan(self) -> dict[str, int]:
        """The bytes, by kind, that each process will hold at most; see :func:`mendfast.training.memory.predict`."""
        parts = self.config.accumulate * self.processes.count
        joint = min(self.config.joint)
        batches = self.batches(self.sampler, 0, joint, 0, parts)
        return predict(self.editor, batches, checkpoint_activations=self.config.checkpoint_activations)

    # -- the run -------------------------------------------------------------------------------------------

    def run(self) -> dict[str, float]:
        """Train to ``config.steps``, or until validation stops improving; returns the last metrics, and as
        "peak_bytes" the most memory that was taken (of the GPU; on a CPU, by the process)."""
        self.editor.gather = self.processes.gather
        self.processes.agree(self.editor, self.step)
        self._record.open(self.step)
        reset_peak(self.editor.device)
        bar = tqdm(
            total=self.config.steps,
            initial=self.step,
            desc="meta-training",
            unit="step",
            disable=not self.progress,
        )
        try:
            metrics = self._run(bar)
        finally:
            self.editor.gather = None
            self._record.close()
            bar.close()
        self.save()
        if self.output and self.processes.main:
            write_report(self.output)
        self.editor.eval()
        return {**metrics, "peak_bytes": peak_bytes(self.editor.device)}

    def _run(self, bar: tqdm) -> dict[str, float]:
        config, recent, in_a_row = self.config, deque(maxlen=50), 0
        metrics: dict[str, float] = {}
        validated: dict[str, float] = {}
        started, done = time.perf_counter(), 0
        while self.step < config.steps:
            self.editor.train()
            joint = config.joint_size(self.step)
            losses = self._gradients(joint)
            norm = float(torch.nn.utils.clip_grad_norm_(self.editor.parameters(), config.clip))
            if math.isfinite(losses["loss"]) and math.isfinite(norm):
                self._update()
                in_a_row = 0
            else:
                self.skipped, in_a_row = self.skipped + 1, in_a_row + 1
                if in_a_row == MAX_SKIPPED_IN_A_ROW:
                    raise TrainingError(
                        f"{in_a_row} steps in a row had a loss or gradient that is not finite (the last loss was "
                        f"{losses['loss']}); stopped at step {self.step}. "
                        + (f"The last good checkpoint is {self.output / 'last'}. " if self.output else "")
                        + "Lower the learning rates or step_size, or load the base model in float32."
                    )
            self.step, done = self.step + 1, done + config.groups(joint) * joint
            metrics = {"step": self.step, "joint": joint, "gradient_norm": norm, **losses}
            if joint == 1:
                recent.append(metrics["edit_success"])
            rate = done / (time.perf_counter() - started)
            bar.set_postfix(
                loss=f"{metrics['loss']:.3f}",
                ES=f"{sum(recent) / max(1, len(recent)):.2f}",
                **({"val": f"{validated['val_loss']:.3f}"} if validated else {}),
                edits_s=f"{rate:.0f}",
                **({"skipped": self.skipped} if self.skipped else {}),
            )
            bar.update()
            if config.validate_every and (self.step % config.validate_every == 0 or self.step == config.steps):
                validated = self.validate()
                metrics |= validated
                self._keep_best(validated)
            self._record.add(metrics)
            if self.step % config.checkpoint_every == 0 or self.step == config.steps:
                self.save()
            if config.patience and self.stale >= config.patience:
                bar.write(f"No better validation loss in {self.stale} validations: stopped at step {self.step}.")
                break
        return metrics

    def batches(self, sampler: FactSampler, step: int, joint: int, part: int, parts: int) -> tuple[Batch, ...]:
        """Part ``part`` of ``parts`` of a step's inner, outer and locality examples: an equal share of its edits."""
        draw = sampler.draw(step, self.config.groups(joint) * joint)
        return tuple(
            self.editor.tokenize(pairs[part * len(pairs) // parts : (part + 1) * len(pairs) // parts]) for pairs in draw
        )

    def _loss(self, batches: tuple[Batch, ...], joint: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        config = self.config
        return meta_loss(
            self.editor,
            *batches,
            config.c_edit,
            config.c_loc,
            joint=joint,
            checkpoint_activations=config.checkpoint_activations,
        )

    def _gradients(self, joint: int) -> dict[str, float]:
        """Leave the gradients of a step's edits in the parameters, summed over parts and processes."""
        self.optimizer.zero_grad(set_to_none=True)
        own, sums = self.config.accumulate, {}
        parts = own * self.processes.count
        for part in range(self.processes.rank * own, (self.processes.rank + 1) * own):
            loss, details = self._loss(self.batches(self.sampler, self.step, joint, part, parts), joint)
            (loss / parts).backward()
            for name, value in {"loss": loss.detach(), **details}.items():
                sums[name] = sums.get(name, 0) + value / parts
        self.processes.sum_gradients(self.editor.parameters())
        values = self.processes.sum(torch.stack(list(sums.values()))).tolist()
        return dict(zip(sums, values, strict=True))

    def _update(self) -> None:
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * self.config.rate(self.step)
        self.optimizer.step()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The loss of Algorithm 1 on the validation facts, one edit at a time, and what ``score`` gives."""
        self.editor.eval()
        result: dict[str, float] = {}
        if self.validation is not None:
            result = {f"val_{name}": value for name, value in self._validation_losses().items()}
        if self.score is not None and self.processes.main:
            scored = self.score(self.editor).to_dict()
            result |= {f"val_{name}": value for name, value in scored.items()}
        return result

    def _validation_losses(self) -> dict[str, float]:
        size, processes = min(32, self.config.validation_size), self.processes
        draws = -(-self.config.validation_size // size)
        names = ("loss", "l_edit", "l_loc", "edit_success")
        sums = torch.zeros(len(names), dtype=torch.float64, device=self.editor.device)
        for i in range(draws):
            draw = self.validation.draw(-1 - i, size)
            start, end = (size * (processes.rank + j) // processes.count for j in (0, 1))
            if start < end:
                share = [pairs[start * len(pairs) // size : end * len(pairs) // size] for pairs in draw]
                loss, details = self._loss(tuple(self.editor.tokenize(pairs) for pairs in share), 1)
                values = {"loss": loss, **details}
                sums += torch.stack([values[name] for name in names]).double() * ((end - start) / size / draws)
        return dict(zip(names, processes.sum(sums).tolist(), strict=True))

    def _keep_best(self, validated: dict[str, float]) -> None:
        if "val_loss" not in validated:
            return
        if validated["val_loss"] < self.best:
            self.best, self.stale = validated["val_loss"], 0
            if self.output and self.processes.main:
                self.editor.save_pretrained(self.output / "best")
        else:
            self.stale += 1

    # -- files ---------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write ``last/``: the editor for use, and in one file all that a resume needs. Each file is atomic,
        and the one that a resume reads holds the editor too, so that a kill between them does no harm."""
        if not self.output or not self.processes.main:
            return
        last = self.output / "last"
        progress = {"step": self.step, "skipped": self.skipped, "best": self.best, "stale": self.stale}
        self.editor.save_pretrained(last)
        atomic_write(last / "train_config.json", json.dumps(asdict(self.config), indent=2).encode())
        parameters = self.editor.state_dict()
        checkpoint.write(last / CHECKPOINT, parameters, self.optimizer, self.config, progress)

    def resume(self) -> bool:
        """Go on from ``last/`` if there is one. The run then ends in the same bits as one never interrupted."""
        path = self.output / "last" / CHECKPOINT if self.output else None
        if path is None or not path.is_file():
            return False
        parameters, progress = checkpoint.read(path, self.optimizer, self.config)
        self.editor.load_tensors(parameters, str(path))
        self.step, self.skipped = progress["step"], progress["skipped"]
        self.best, self.stale = progress["best"], progress["stale"]
        return True
