"""The meta-training loop: steps, validation, checkpoints, exact resume."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from ..editor import MendEditor
from ..files import atomic_write, read_tensors, write_tensors
from ..metrics import Score
from .data import Draw, FactSampler
from .meta import meta_loss
from .report import write_report

MAX_SKIPPED_IN_A_ROW = 10


@dataclass
class TrainConfig:
    """How an editor is trained."""

    steps: int = field(default=1000, metadata={"help": "Optimiser steps."})
    batch_size: int = field(default=16, metadata={"help": "Independent edits per step, B."})
    joint: list[int] = field(
        default_factory=lambda: [1],
        metadata={"help": "Sizes of simultaneous edits, drawn at random each step; 1 = alone."},
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "Adam's rate for the editor network."})
    alpha_learning_rate: float = field(default=1e-2, metadata={"help": "Adam's rate for the step sizes."})
    warmup: int = field(default=20, metadata={"help": "Steps of linear warm-up."})
    final_rate: float = field(default=0.05, metadata={"help": "The rate decays linearly to this share."})
    clip: float = field(default=1.0, metadata={"help": "Largest norm of the gradient."})
    c_edit: float = field(default=1.0, metadata={"help": "Weight of the edit's loss (the paper: 0.1)."})
    c_loc: float = field(default=1.0, metadata={"help": "Weight of the locality loss."})
    validate_every: int = field(default=200, metadata={"help": "Steps between validations; 0 = never."})
    validation_size: int = field(default=64, metadata={"help": "Edits in a validation."})
    patience: int = field(
        default=0, metadata={"help": "Stop after so many validations without a better loss; 0 = never."}
    )
    checkpoint_every: int = field(default=200, metadata={"help": "Steps between checkpoints."})
    seed: int = field(default=0, metadata={"help": "Of the data order."})

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "validation_size", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if not self.joint or min(self.joint) < 1:
            raise ValueError(f"joint is {self.joint}; it must be a list of sizes of at least 1.")


class TrainingError(RuntimeError):
    """The run can't go on; the last good checkpoint is in place."""


class Trainer:
    """Trains ``editor`` on what ``sampler`` draws.

    Args:
        output: a directory for ``last/`` and ``best/`` (editors as ``save_pretrained`` writes them, with the
            optimiser's state beside the last), ``metrics.jsonl``, and at the end ``curves.png`` and ``report.html``;
            None keeps everything in memory.
        validate: scores the editor as it is; by default the loss of Algorithm 1 on ``validation`` draws.

    A step whose loss or gradient is not finite is skipped and counted; ten in a row stop the run.
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
    ):
        self.editor, self.sampler, self.config = editor, sampler, config
        self.output = Path(output) if output is not None else None
        self.validation, self.score, self.progress = validation, score, progress
        self.step, self.skipped, self.best, self.stale = 0, 0, math.inf, 0
        networks = [p for name, p in editor.named_parameters() if name != "alpha_multiplier"]
        self.optimizer = torch.optim.Adam(
            [
                {"params": networks, "lr": config.learning_rate},
                {"params": [editor.alpha_multiplier], "lr": config.alpha_learning_rate},
            ]
        )
        self._rates = [group["lr"] for group in self.optimizer.param_groups]

    # -- the run -------------------------------------------------------------------------------------------

    def run(self) -> dict[str, float]:
        """Train to ``config.steps``, or until validation stops improving; returns the last metrics."""
        self._trim_log()
        config, recent, in_a_row = self.config, deque(maxlen=50), 0
        metrics: dict[str, float] = {}
        validated: dict[str, float] = {}
        started, done = time.perf_counter(), 0
        bar = tqdm(total=config.steps, initial=self.step, desc="meta-training", unit="step", disable=not self.progress)
        while self.step < config.steps:
            self.editor.train()
            joint = self._joint_size(self.step)
            loss, parts = self._loss(self.sampler, self.step, joint)
            norm = self._backward(loss)
            if math.isfinite(norm):
                self.optimizer.step()
                in_a_row = 0
            else:
                self.skipped, in_a_row = self.skipped + 1, in_a_row + 1
                if in_a_row == MAX_SKIPPED_IN_A_ROW:
                    raise TrainingError(
                        f"{in_a_row} steps in a row had a loss or gradient that is not finite (the last loss was "
                        f"{loss.item()}); stopped at step {self.step}. "
                        + (f"The last good checkpoint is {self.output / 'last'}. " if self.output else "")
                        + "Lower the learning rates or step_size, or load the base model in float32."
                    )
            self.step, done = self.step + 1, done + max(config.batch_size, joint)
            metrics = {"step": self.step, "joint": joint, "loss": loss.item(), "gradient_norm": norm}
            metrics |= {name: value.item() for name, value in parts.items()}
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
            self._log(metrics)
            if self.step % config.checkpoint_every == 0 or self.step == config.steps:
                self.save()
            if config.patience and self.stale >= config.patience:
                bar.write(f"No better validation loss in {self.stale} validations: stopped at step {self.step}.")
                break
        bar.close()
        self.save()
        if self.output:
            write_report(self.output)
        self.editor.eval()
        return metrics

    def _joint_size(self, step: int) -> int:
        return self.config.joint[hash((self.config.seed, step)) % len(self.config.joint)]

    def _loss(self, sampler: FactSampler, step: int, joint: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        size = max(1, self.config.batch_size // joint) * joint
        draw: Draw = sampler.draw(step, size)
        batches = [self.editor.tokenize(pairs) for pairs in draw]
        return meta_loss(self.editor, *batches, self.config.c_edit, self.config.c_loc, joint=joint)

    def _backward(self, loss: torch.Tensor) -> float:
        config = self.config
        share = min((self.step + 1) / max(1, config.warmup), 1.0)
        decay = 1 - (1 - config.final_rate) * self.step / max(1, config.steps)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * share * decay
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.editor.parameters(), config.clip)
        return float(norm) if torch.isfinite(loss) else math.nan

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The loss of Algorithm 1 on the validation facts, one edit at a time, and what ``score`` gives."""
        self.editor.eval()
        result: dict[str, float] = {}
        if self.validation is not None:
            size, totals = min(32, self.config.validation_size), []
            for i in range(-(-self.config.validation_size // size)):
                draw = self.validation.draw(-1 - i, size)
                batches = [self.editor.tokenize(pairs) for pairs in draw]
                totals.append(meta_loss(self.editor, *batches, self.config.c_edit, self.config.c_loc))
            result["val_loss"] = sum(total.item() for total, _ in totals) / len(totals)
            for name in totals[0][1]:
                result[f"val_{name}"] = sum(parts[name].item() for _, parts in totals) / len(totals)
        if self.score is not None:
            scored = self.score(self.editor).to_dict()
            result |= {f"val_{name}": value for name, value in scored.items()}
        return result

    def _keep_best(self, validated: dict[str, float]) -> None:
        if "val_loss" not in validated:
            return
        if validated["val_loss"] < self.best:
            self.best, self.stale = validated["val_loss"], 0
            if self.output:
                self.editor.save_pretrained(self.output / "best")
        else:
            self.stale += 1

    # -- files ---------------------------------------------------------------------------------------------

    def _log(self, metrics: dict[str, float]) -> None:
        if self.output:
            self.output.mkdir(parents=True, exist_ok=True)
            with (self.output / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(metrics) + "\n")

    def save(self) -> None:
        """Write ``last/``: the editor for use, and in one file all that a resume needs. Each file is atomic,
        and the one that a resume reads holds the editor too, so that a kill between them does no harm."""
        if not self.output:
            return
        last = self.output / "last"
        tensors = {f"editor:{name}": tensor for name, tensor in self.editor.state_dict().items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam:{i}:{name}": torch.as_tensor(value) for name, value in state.items()}
        progress = {"step": self.step, "skipped": self.skipped, "best": self.best, "stale": self.stale}
        metadata = {
            "format": "mendfast.checkpoint",
            "progress": json.dumps(progress),
            "config": json.dumps(asdict(self.config)),
        }
        self.editor.save_pretrained(last)
        atomic_write(last / "train_config.json", json.dumps(asdict(self.config), indent=2).encode())
        write_tensors(last / "checkpoint.safetensors", tensors, metadata)

    def resume(self) -> bool:
        """Go on from ``last/`` if there is one. The run then ends in the same bits as one never interrupted."""
        path = self.output / "last" / "checkpoint.safetensors" if self.output else None
        if path is None or not path.is_file():
            return False
        tensors, metadata = read_tensors(path, "checkpoint")
        saved = json.loads(metadata["config"])
        changed = [k for k, v in asdict(self.config).items() if saved.get(k) != v]
        if changed:
            raise ValueError(
                f"{path.parent} was trained with other settings ({', '.join(changed)}); "
                "resume with the same ones, or choose another output directory."
            )
        own = {name.removeprefix("editor:"): t for name, t in tensors.items() if name.startswith("editor:")}
        self.editor.load_tensors(own, str(path))
        state = self.optimizer.state_dict()
        state["state"] = {}
        for name, tensor in tensors.items():
            if name.startswith("adam:"):
                _, i, key = name.split(":")
                state["state"].setdefault(int(i), {})[key] = tensor
        self.optimizer.load_state_dict(state)
        progress = json.loads(metadata["progress"])
        self.step, self.skipped = progress["step"], progress["skipped"]
        self.best, self.stale = progress["best"], progress["stale"]
        return True

    def _trim_log(self) -> None:
        """Drop the log's lines past the checkpoint: their steps are run again."""
        path = self.output / "metrics.jsonl" if self.output else None
        if path is not None and path.is_file():
            kept = []
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= self.step:
                        kept.append(line)
                except (json.JSONDecodeError, KeyError):
                    continue  # the line that the kill cut short
            atomic_write(path, "".join(f"{line}\n" for line in kept).encode())
