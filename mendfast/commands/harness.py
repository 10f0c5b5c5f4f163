"""What an edit costs elsewhere: tasks of lm-evaluation-harness, asked before an edit and of the edited model."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..baselines import System
from ..baselines.in_context import InContext
from ..schema import brief
from ..tasks.records import Example

BATCH = 8
"""Documents at a time."""


class Harness:
    """Asks tasks of EleutherAI's lm-evaluation-harness (the package ``lm_eval``).

    Args:
        tasks: their names there, or YAML files that define one, as the harness reads them.
        limit: documents of each task; None: all.
    """

    def __init__(self, tasks: Sequence[str], limit: int | None = None):
        self.limit, self.tasks = limit, list(tasks)
        self.names, folders = [], []
        for task in tasks:
            if task.endswith((".yaml", ".yml")):
                path = Path(task)
                if not path.is_file():
                    raise FileNotFoundError(f"There is no file {task}, which --harness names.")
                folders.append(str(path.parent.resolve()))
                self.names.append(_name(path))
            else:
                self.names.append(task)
        self.folders = list(dict.fromkeys(folders))
        self._before: dict[int, dict[str, float]] = {}  # by the model's id
        self._manager: Any = None

    def ask(self, system: System, group: Sequence[Example], *, in_turn: bool = False) -> dict[str, Any]:
        """Each task's figures before and after one edit by all of ``group``; what the edit changes outside of the
        model's weights, as in-context editing, is not seen, and not asked."""
        if isinstance(system, InContext):
            return {}
        model, tokenizer = system.subject.model, system.subject.tokenizer
        if id(model) not in self._before:
            self._before[id(model)] = self._figures(model, tokenizer)
        requests = [(example.prompt, example.target) for example in group]
        try:
            with system.edit(requests, in_turn=in_turn):
                after = self._figures(model, tokenizer)
        except (ValueError, RuntimeError, ArithmeticError) as error:  # of the edit: as in the table
            return {"k": len(requests), "error": f"{type(error).__name__}: {error}"}
        return {"k": len(requests), "before": self._before[id(model)], "after": after}

    def _figures(self, model: Any, tokenizer: Any) -> dict[str, float]:
        """By "task metric"."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        if self._manager is None:
            known = not all(task.endswith((".yaml", ".yml")) for task in self.tasks)
            self._manager = TaskManager(include_path=self.folders or None, include_defaults=known)
            if unknown := [name for name in self.names if name not in self._manager.all_tasks]:
                raise ValueError(
                    f"lm-evaluation-harness has no task {brief(repr(unknown[0]))}; `lm-eval ls tasks` lists those that "
                    "it has, and a YAML file makes one's own."
                )
        asked = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH)
        found = simple_evaluate(
            model=asked, tasks=self.names, limit=self.limit, task_manager=self._manager, bootstrap_iters=0,
            log_samples=False,
        )  # fmt: skip
        figures = {}
        for task, values in found["results"].items():
            for key, value in values.items():
                metric, _, rule = key.partition(",")
                if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                    if not metric.endswith("_stderr") and metric != "sample_len":
                        figures[f"{task} {metric}" + (f" ({rule})" if rule not in ("", "none") else "")] = float(value)
        return figures


def _name(path: Path) -> str:
    """What a task file calls its task."""
    for line in path.read_text().splitlines():
        key, found, value = line.partition(":")
        if found and key.strip() == "task" and value.strip():
            return value.strip().strip("\"'")
    raise ValueError(f"{path} names no task; a task file of lm-evaluation-harness has a line `task: name`.")
