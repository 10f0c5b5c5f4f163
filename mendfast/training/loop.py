"""The meta-training loop: steps, validation, checkpoints, exact resume."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import shutil
import signal
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from ..editor import MendEditor
from ..files import atomic_write
from ..stopping import Stopping
from . import checkpoint
from .config import TrainConfig
from .data import Draw, Sampler, fingerprint, share
from .learner import EditorLearner, Learner
from .lock import occupied
from .memory import peak_bytes, reset_peak
from .precision import check_precision
from .processes import Processes, launched
from .record import Record
from .report import read_metrics, write_report

if TYPE_CHECKING:
    from accelerate import Accelerator

MAX_SKIPPED_IN_A_ROW = 10
CHECKPOINT = "checkpoint.safetensors"
SMALLER = "Lower the learning rates or step_size, or load the base model in float32."
START_EDITS = 16  # that a learner sees before its first step, to start from

log = logging.getLogger("mendfast")


class TrainingError(RuntimeError):
    """The run can't go on; the last good checkpoint is in place."""


class Trainer:
    """Trains a learner (an editor is one) on what ``sampler`` draws.

    Args:
        learner: a :class:`~mendfast.training.learner.Learner`, or an editor.
        output: a directory for ``last/`` and ``best/`` (editors as ``save_pretrained`` writes them, with the
            optimiser's state beside the last), ``metrics.jsonl``, with ``cache_disk_bytes`` ``cache/``, and at the
            end ``curves.png`` and ``report.html``; None keeps everything in memory.
        validation: draws for the loss of Algorithm 1 that the best editor and ``patience`` go by.
        tensorboard: write events to ``output/tensorboard`` too.
        accelerator: of a run in several processes; by default made when torchrun or accelerate has launched them.
            Each takes its share of every step's edits, so that the steps are those of one process that takes all;
            the first writes the files.

    A step whose loss or gradient is not finite is skipped and counted; ten in a row stop the run. With an ``output``
    Ctrl-C and SIGTERM let the step end and be saved, and then do what they did before (a second Ctrl-C at once).

    Raises:
        ValueError: a step's edits can't be divided evenly by processes and ``accumulate``, or a precision that the
            device has no units for.
    """

    def __init__(
        self,
        learner: Learner | MendEditor,
        sampler: Sampler,
        config: TrainConfig,
        *,
        output: str | Path | None = None,
        validation: Sampler | None = None,
        progress: bool = True,
        tensorboard: bool = False,
        accelerator: Accelerator | None = None,
    ):
        self.learner = EditorLearner(learner) if isinstance(learner, MendEditor) else learner
        self.sampler, self.config = sampler, config
        self.editor = self.learner.subject
        self.device = self.editor.device
        check_precision(config.precision, self.device)
        self.output = Path(output) if output is not None else None
        self.validation = validation
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
        self._saved = time.monotonic()
        self._known: dict[str, Any] | None = None
        self.optimizer = torch.optim.Adam(
            self.learner.parameter_groups(config),
            fused=self.device.type in ("cpu", "cuda"),  # in place: no temporaries of the parameters' size
        )
        self._rates = [group["lr"] for group in self.optimizer.param_groups]

    def plan(self) -> dict[str, int]:
        """The bytes, by kind, that each process will hold at most: what the largest joint size takes."""
        joint = max(self.config.joint)
        draw = share(self._draw(0, joint), 0, self.config.accumulate * self.processes.count)
        return self.learner.plan(draw, self.config, joint)

    def plan_cache(self) -> dict[str, int]:
        """What each process's cache of the frozen part will hold at the end, at most: its texts, their bytes, those in
        memory and on disk; nothing where there is none."""
        first, own = self._draws(0)
        return self.learner.plan_cache(itertools.chain(first, own), len(first) + self.config.steps, self.config)

    def _draws(self, start: int) -> tuple[list[Draw], Iterator[Draw]]:
        """What this process asks for in a run from step ``start``: beside the steps, and in them."""
        config, count, rank = self.config, self.processes.count, self.processes.rank
        first = [self.sampler.draw(0, START_EDITS)] if config.calibrate and not start else []
        if self.validation is not None and config.validate_every:
            size = min(32, config.validation_size)
            first += [self.validation.draw(-1 - i, size) for i in range(-(-config.validation_size // size))]
        steps = range(start, config.steps)
        return first, (share(self._draw(step, config.joint_size(step)), rank, count) for step in steps)

    def summary(self) -> str:
        """What there is to say of the last run beside its metrics: what the cache of the frozen part saved."""
        return self.learner.summary()

    # -- the run -------------------------------------------------------------------------------------------

    def run(self) -> dict[str, float]:
        """Train to ``config.steps``, or until validation stops improving; returns the last metrics, and as
        "peak_bytes" the most memory that was taken (of the GPU; on a CPU, by the process)."""
        with contextlib.ExitStack() as stack:
            if self.output and self.processes.main:
                stack.enter_context(occupied(self.output))
            return self._whole_run()

    def _whole_run(self) -> dict[str, float]:
        on_disk = self.output is not None and self.config.cache_disk_bytes
        self.learner.open_cache(self.config, self.output / "cache" if on_disk else None)
        if self.config.prefill:
            self.learner.prefill(itertools.chain(*self._draws(self.step)), self.config, self.progress)
        self.learner.gather_with(self.processes.gather)
        self.processes.agree(self.learner.state(), self.step)
        if self.step == 0:
            self.learner.start(self.sampler.draw(0, START_EDITS), self.config)
        self._record.open(self.step)
        reset_peak(self.device)
        bar = tqdm(
            total=self.config.steps,
            initial=self.step,
            desc=self.learner.name,
            unit="step",
            disable=not self.progress,
        )
        several = self.processes.count > 1  # then all stop at the same step, or wait for each other
        # Without an output there is nothing to finish for.
        with Stopping(several) if self.output or several else contextlib.nullcontext() as stopping:
            try:
                metrics = self._run(bar, stopping)
                if metrics and not self.save():
                    raise TrainingError(f"{self.learner.name}: {self._not_finite()}. {SMALLER}")
            finally:
                self.optimizer.zero_grad(set_to_none=True)
                self.learner.gather_with(None)
                self._record.close()
                bar.close()
            self.learner.flush_cache()
            if self.output and self.processes.main:
                # A run that had ended before has no step left to tell of.
                metrics = metrics or read_metrics(self.output)[-1]
                write_report(self.output)
        self.learner.train(False)
        return {**metrics, "peak_bytes": peak_bytes(self.device)}

    def _run(self, bar: tqdm, stopping: Stopping | None) -> dict[str, float]:
        config, recent, in_a_row = self.config, deque(maxlen=50), 0
        metrics: dict[str, float] = {}
        validated: dict[str, float] = {}
        started, done = time.perf_counter(), 0
        self._saved = time.monotonic()
        parameters = self.learner.parameters(config)
        while self.step < config.steps and not self._ended():
            self.learner.train()
            joint = config.joint_size(self.step)
            losses = self._gradients(joint)
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, config.clip))
            if math.isfinite(losses["loss"]) and math.isfinite(norm):
                self._update()
                in_a_row = 0
            else:
                self.skipped, in_a_row = self.skipped + 1, in_a_row + 1
                if in_a_row == MAX_SKIPPED_IN_A_ROW:
                    raise TrainingError(
                        f"{self.learner.name}: {in_a_row} steps in a row had a loss or gradient that is not "
                        f"finite (the last loss was {losses['loss']}); stopped at step {self.step}. "
                        + (f"The last good checkpoint is {self.output / 'last'}. " if self.output else "")
                        + SMALLER
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
            if self.step % config.checkpoint_every == 0 and self.step < config.steps or self._is_late():
                self.save()
            if stopping and (number := self.processes.most(stopping.asked or 0)):
                bar.clear()
                self._interrupted(number)
                stopping.hand_over(number)
            if self._ended():
                bar.write(f"No better validation loss in {self.stale} validations: stopped at step {self.step}.")
        return metrics

    def _is_late(self) -> bool:
        """Whether ``checkpoint_minutes`` have passed since the last checkpoint."""
        minutes = self.config.checkpoint_minutes
        return 0 < minutes * 60 <= time.monotonic() - self._saved

    def _interrupted(self, number: int) -> None:
        saved = self.save()
        self.processes.most(0)  # a process that ends takes the others with it
        if self.processes.main and self.output:
            log.warning(
                "%s: %s after step %d of %d; %s. The same command goes on there (in Python, Trainer.resume() and "
                "run()).",
                self.learner.name,
                signal.Signals(number).name,
                self.step,
                self.config.steps,
                f"everything is in {self.output / 'last'}" if saved else self._not_finite(),
            )

    def _not_finite(self) -> str:
        good = self.output / "last" / CHECKPOINT if self.output else None
        kept = f"; {good} is the last good checkpoint" if good and good.is_file() else ""
        return f"the parameters of step {self.step} are not finite and were not saved{kept}"

    def _ended(self) -> bool:
        """Whether validation has not improved for as long as ``patience`` bears."""
        return 0 < self.config.patience <= self.stale

    def _draw(self, step: int, joint: int) -> Draw:
        return self.sampler.draw(step, self.config.groups(joint) * joint)

    def _gradients(self, joint: int) -> dict[str, float]:
        """Leave the gradients of a step's edits in the parameters, summed over parts and processes."""
        self.optimizer.zero_grad(set_to_none=True)
        own, draw = self.config.accumulate, self._draw(self.step, joint)
        parts = own * self.processes.count
        sums: Counter[str] = Counter()
        for part in range(self.processes.rank * own, (self.processes.rank + 1) * own):
            sums.update(self._means(share(draw, part, parts), joint, 1 / parts, backward=True))
        self.processes.sum_gradients(self.learner.parameters(self.config))
        return self._over_processes(sums)

    def _means(self, draw: Draw, joint: int, weight: float, *, backward: bool = False) -> dict[str, torch.Tensor]:
        """``weight`` times the draw's loss and the means of its parts' metrics; ``backward``: and their gradients."""
        loss, count = torch.zeros((), dtype=torch.float64, device=self.device), 0
        metrics: Counter[str] = Counter()
        for part, found in self.learner.losses(draw, self.config, joint):
            if backward:
                (part * weight).backward()
            loss, count = loss + part.detach(), count + 1
            metrics.update({name: value.double() for name, value in found.items()})
        return {"loss": loss * weight, **{name: value * (weight / count) for name, value in metrics.items()}}

    def _over_processes(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        values = self.processes.sum(torch.stack([value.to(self.device) for value in sums.values()])).tolist()
        return dict(zip(sums, values, strict=True))

    def _update(self) -> None:
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * self.config.rate(self.step)
        self.optimizer.step()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The learner's loss on the validation facts, one edit at a time; nothing without those."""
        self.learner.train(False)
        if self.validation is None:
            return {}
        size, processes = min(32, self.config.validation_size), self.processes
        draws = -(-self.config.validation_size // size)
        sums: Counter[str] = Counter()
        for i in range(draws):
            draw = self.validation.draw(-1 - i, size)
            start, end = (size * (processes.rank + j) // processes.count for j in (0, 1))
            own = Draw(*(pairs[start * len(pairs) // size : end * len(pairs) // size] for pairs in draw))
            # A process without edits measures the first, for nothing, so that all hold the same figures' names.
            own, weight = (own, (end - start) / size / draws) if start < end else (share(draw, 0, size), 0.0)
            sums.update(self._means(own, 1, weight))
        return {f"val_{name}": value for name, value in self._over_processes(sums).items()}

    def _keep_best(self, validated: dict[str, float]) -> None:
        if "val_loss" not in validated:
            return
        if validated["val_loss"] < self.best and self.learner.finite():
            self.best, self.stale = validated["val_loss"], 0
            if self.output and self.processes.main:
                self.learner.save(self.output / "best")
        else:
            self.stale += 1

    # -- files ---------------------------------------------------------------------------------------------

    def save(self) -> bool:
        """Write ``last/``: the editor for use, and in one file all that a resume needs. Each file is atomic,
        and the one that a resume reads holds the editor too, so that a kill between them does no harm.

        Returns:
            False if the parameters are not finite: nothing is written then, and what was there stays.
        """
        if not self.learner.finite() or not all(
            bool(value.isfinite().all())
            for state in self.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        ):
            return False
        if not self.output or not self.processes.main:
            return True
        last = self.output / "last"
        progress = {"step": self.step, "skipped": self.skipped, "best": self.best, "stale": self.stale}
        self.learner.save(last)
        atomic_write(last / "train_config.json", json.dumps(asdict(self.config), indent=2).encode())
        checkpoint.write(
            last / CHECKPOINT,
            self.learner.state(),
            self.optimizer,
            self.config,
            progress,
            self._identity(),
            learner=self.learner.key,
        )
        self._saved = time.monotonic()
        return True

    def _identity(self) -> dict[str, Any]:
        """What a run must have in common with the one that it goes on from, beside the configuration."""
        if self._known is None:
            settings = self.learner.settings()
            if self.config.calibrate:
                settings.pop("step_size", None)
            data = {"training data": fingerprint(self.sampler), "validation data": fingerprint(self.validation)}
            self._known = {**settings, **data}
        return self._known

    def restart(self) -> None:
        """Remove what an earlier run left in the output directory; the base model and the cache stay."""
        if not self.output or not self.processes.main:
            return
        with occupied(self.output):
            (self.output / "last" / CHECKPOINT).unlink(missing_ok=True)  # first: half of a run is no run
            for name in ("last", "best"):
                shutil.rmtree(self.output / name, ignore_errors=True)
            for name in ("metrics.jsonl", "curves.png", "report.html"):
                (self.output / name).unlink(missing_ok=True)

    def resume(self) -> bool:
        """Go on from ``last/`` if there is one. The run then ends in the same bits as one never interrupted.

        Raises:
            ValueError: what is there was trained with other settings (those of :class:`TrainConfig` that may change
                say "free"), another base model or other data, or is damaged.
        """
        path = self.output / "last" / CHECKPOINT if self.output else None
        if path is None or not path.is_file():
            return False
        state, progress = checkpoint.read(path, self.optimizer, self.config, self._identity(), learner=self.learner.key)
        self.learner.load_tensors(state, str(path))
        self.step, self.skipped = progress["step"], progress["skipped"]
        self.best, self.stale = progress["best"], progress["stale"]
        return True
