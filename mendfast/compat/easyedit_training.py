"""EasyEdit's data sets and trainer, over mendfast.tasks and mendfast.training."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..editor import MendEditor
from ..tasks.qa import QuestionAnswering, read_qa
from ..tasks.records import Problem
from ..training import Trainer
from .easyedit_hparams import HyperParams, MENDTrainingHparams
from .easyedit_model import load_archive, load_model

log = logging.getLogger("mendfast")


class _Dataset:
    """Records as EasyEdit's data sets give them: ``len(data)``, ``data[i]``, and ``data.examples`` for mendfast."""

    format = "auto"

    def __init__(self, data_dir: str | Path, size: int | None = None, config: HyperParams | None = None):
        self.config = config
        self.examples, self.problems = read_qa(data_dir, limit=size, format=self.format)
        _tell(self.problems)

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, item: int) -> dict[str, Any]:
        example = self.examples[item]
        truth = example.answers[0] if example.answers else None
        record = {
            "case_id": range(len(self))[item],
            "prompt": example.prompt,
            "target_new": example.target,
            "ground_truth": truth,
            "rephrase_prompt": example.rephrasings[0] if example.rephrasings else None,
            "cond": f"{truth} >> {example.target} || {example.prompt}",
            "locality_prompt": example.locality[0][0] if example.locality else None,
            "locality_ground_truth": example.locality[0][1] if example.locality else None,
        }
        return record if example.subject is None else {**record, "subject": example.subject}


def _tell(problems: Sequence[Problem]) -> None:
    for problem in problems[:5]:
        log.warning("%s", problem)
    if len(problems) > 5:
        log.warning("and %d more such records", len(problems) - 5)


class ZsreDataset(_Dataset):
    """zsRE as ``zsre_mend_train.json`` holds it: src, alt, answers, rephrase, loc, loc_ans."""

    format = "zsre"


class CounterFactDataset(_Dataset):
    """CounterFact as EasyEdit flattens it (prompt, target_new, ...), or as ROME has it (requested_rewrite)."""


class EditTrainer:
    """Meta-training as EasyEdit starts it: ``EditTrainer(config, train_set, val_set).run()``.

    The editor goes to ``results_dir/models/MEND/<model's name>/best``; that directory, or the one above it, is the
    ``archive`` to edit with.

    Attributes:
        editor: the :class:`~mendfast.MendEditor` in training.
        output: where its files go.
    """

    def __init__(self, config: MENDTrainingHparams, train_set: _Dataset, val_set: _Dataset | None = None):
        if not isinstance(config, MENDTrainingHparams):
            raise TypeError(f"config is a {type(config).__name__}; pass a MENDTrainingHparams.")
        self.config = config
        model, tokenizer = load_model(config)
        torch.manual_seed(int(config.seed))
        if config.archive is None:
            self.editor = MendEditor.from_model(model, tokenizer, config.editor_config())
        else:
            self.editor = load_archive(config, model, tokenizer)
        name = config.model_name if isinstance(config.model_name, str) else type(model).__name__
        self.output = Path(config.results_dir) / "models" / "MEND" / Path(name).name
        settings = config.train_config(len(train_set))
        task = QuestionAnswering(train_set.examples, train_set.problems, settings.seed)
        task.check(model, self.editor.kind)
        _tell(task.sieve(self.editor))
        if val_set is None:
            validation = task.sampler(settings.seed + 1, held_out=True)
        else:
            held_out = QuestionAnswering(val_set.examples, val_set.problems, settings.seed)
            _tell(held_out.sieve(self.editor))
            validation = held_out.sampler(settings.seed + 1)
        sampler = task.sampler(settings.seed)
        self.trainer = Trainer(self.editor, sampler, settings, output=self.output, validation=validation)

    def run(self) -> dict[str, float]:
        """Train; goes on where an interrupted run stopped. Returns the last figures."""
        if self.trainer.resume():
            log.info("Going on from step %d.", self.trainer.step)
        return self.trainer.run()
