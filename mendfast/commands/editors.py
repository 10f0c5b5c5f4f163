"""``mendfast editors``: which editors ship, and how one is made: the same data, seed and settings for everyone."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from .. import pretrained
from ..choice import blocks_of
from ..config import MendConfig
from ..editable import EditableModel
from ..editor import MendEditor
from ..editors import shipped
from ..files import atomic_write, read_json_bytes
from ..metric import Metric
from ..schema import check_object, check_settings, parse_json
from ..training import FactSampler, FormSampler, TrainConfig, Trainer
from ..training.data import digest
from ..training.learner import base_model_digest
from ..training.lock import occupied
from .console import make_console, plain
from .editor_texts import FORMS, Texts, gather
from .loading import LoadSettings, load_model
from .outputs import check_directory

EDITED = slice(-7, -1)
"""Blocks. In those before, of SmolLM2, a question's rephrasing has less in common with it where its answer begins: once
what is protected is discounted an edit's response to it is .61 at block 22 and .77 at block 23, to other questions .09
and .08. The last one's edits change other answers as much, and say no target."""
EDITOR = MendConfig(
    rank=192,
    scale_v=True,
    chat=True,
    forms=["chat", "plain"],
    rows="answers",
    aggregation="least_squares",
    protect_rank=420,
    ridge=1e-4,
    protection=60.0,
    rounds=8,
)
TRAINING = TrainConfig(
    steps=640,
    batch_size=32,
    joint=[1, 1, 8, 8, 32, 96, 256],
    learning_rate=1e-3,
    alpha_learning_rate=2e-2,
    calibrate=True,
    warmup=10,
    c_loc=8.0,
    c_loc_decay=0.5,
    loc_root=True,
    validate_every=80,
    validation_size=64,
    checkpoint_every=10,
    cache_bytes=4 << 30,
    loc_positions=16,
    loc_answers=True,
)
MADE = ("own_words.json", "turns.json", "own_answers.json", "metric.safetensors")
"""Files beside a run that it is made of."""


def layers_of(model: Any) -> list[str]:
    """The MLPs' output projections in the blocks :data:`EDITED` (of a smaller model in those that it has): their inputs
    are the widest there are, so that two questions have the least in common."""
    _, blocks = blocks_of(model)[-1]
    return [weights[-1] for _, weights in blocks[EDITED] or blocks]


def build(
    model: Any,
    tokenizer: Any,
    output: str | Path,
    *,
    data: str | None = None,
    text: str | None = None,
    editor: MendConfig = EDITOR,
    training: TrainConfig = TRAINING,
    restart: bool = False,
) -> MendEditor:
    """Train an editor for a chat model; an interrupted run goes on. What ships is then in ``output/editor``.

    Args:
        restart: start anew, whatever ``output`` holds.

    Raises:
        ValueError: what lies in ``output`` was made of another model, other data or with other settings.
        Occupied: another training is at work there.
    """
    with occupied(output):
        return _build(model, tokenizer, Path(output), data, text, editor, training, restart)


def _build(
    model: Any,
    tokenizer: Any,
    output: Path,
    data: str | None,
    text: str | None,
    editor: MendConfig,
    training: TrainConfig,
    restart: bool,
) -> MendEditor:
    kept_metric, made_of = output / "metric.safetensors", output / "made_of.json"
    if restart:
        for name in (*MADE, made_of.name):
            (output / name).unlink(missing_ok=True)
    _check_made_of(made_of, model, tokenizer, data, text, editor, training)
    torch.manual_seed(training.seed)
    if editor.layers is None:
        editor = replace(editor, layers=layers_of(model))
    made = MendEditor.from_model(model, tokenizer, editor)
    texts = gather(made, output, data, text, training.seed)
    protected, looked_at = texts.halves(random.Random(training.seed))
    if kept_metric.is_file():
        made.protect_with(Metric.load(kept_metric))
    else:
        protected.protect(made, random.Random(training.seed))
        made.metric.save(kept_metric)
    train, validation = samplers(looked_at, training.seed)
    trainer = Trainer(made, train, training, output=output, validation=validation)
    if restart:
        trainer.restart()
    else:
        trainer.resume()
    trainer.run()
    best = output / "best" if (output / "best").is_dir() else output / "last"
    made = MendEditor.from_pretrained(best, model, tokenizer)
    texts.protect(made, random.Random(training.seed))  # what ships protects all that there is
    made.save_pretrained(output / "editor")
    return made


def samplers(texts: Texts, seed: int) -> tuple[FormSampler, FormSampler]:
    """What is trained on, and what validates."""
    rng = random.Random(seed)
    own = [*texts.own, *texts.said, *texts.said]
    stay = [*rng.sample(texts.pieces, min(len(texts.pieces), len(own) // 4)), *own]
    editable = [replace(item, wordings=item.wordings[:4]) for item in texts.items if len(item.wordings) > 1]
    editable = editable or texts.items
    parts = [item for i, item in enumerate(editable) if i % 40] or editable, editable[::40]
    made = []
    for part, own_seed in zip(parts, (seed, seed + 1), strict=True):
        drawn = FactSampler(part, neighbours=texts.items, loc=2, include_inner=0.4, seed=own_seed)
        # edited as the editor, which has ``chat``, will be asked
        made.append(FormSampler(drawn, forms=FORMS, inner={"chat": 1.0}, texts=stay))
    return made[0], made[1]


def _check_made_of(
    path: Path,
    model: Any,
    tokenizer: Any,
    data: str | None,
    text: str | None,
    editor: MendConfig,
    training: TrainConfig,
) -> None:
    """The model's words and the metric are kept beside the run: made of something else they would go into it unseen."""
    subject = EditableModel(model, tokenizer, editor)
    read = {name: digest(Path(file).read_bytes()) if file and Path(file).is_file() else file or ""
            for name, file in (("data", data), ("text", text))}  # fmt: skip
    now = {"base model": base_model_digest(subject), "seed": training.seed, "protect_rank": editor.protect_rank, **read}
    if path.is_file():
        before = check_object(parse_json(read_json_bytes(path), str(path)), str(path))
        advice = "pass the same ones, another --output, or --restart (restart=True) to start anew in this one."
        check_settings(f"The run in {path.parent} was begun", before, now, advice)
    else:
        atomic_write(path, json.dumps(now, indent=2).encode() + b"\n")


@dataclass(kw_only=True)
class EditorsSettings(LoadSettings):
    """What ``mendfast editors`` is asked."""

    NAMES_MODEL: ClassVar[str] = "--build"
    model: str | None = field(default=None, metadata={"option": False})  # is build
    dtype: str = field(default="float32", metadata={"help": "of the model", "choices": pretrained.DTYPES})
    build: str | None = field(
        default=None, metadata={"help": "make the editor of this chat model, anew or going on", "metavar": "MODEL"}
    )
    data: str | None = field(default=None, metadata={"help": "for --build: questions and answers"})
    text: str | None = field(default=None, metadata={"help": "for --build: a file of running text", "metavar": "FILE"})
    output: str | None = field(default=None, metadata={"help": "for --build: where the run goes", "metavar": "DIR"})
    restart: bool = field(default=False, metadata={"help": "for --build: start anew where --output holds a run"})

    def __post_init__(self) -> None:
        self.model = self.build
        super().__post_init__()
        if self.build is None:
            if given := [name for name in ("data", "text", "output", "restart") if getattr(self, name)]:
                raise ValueError(f"--{given[0]} goes with --build MODEL; pass both, or neither to list what ships.")
            return
        if not self.output:
            raise ValueError("--build needs --output DIR, where the run goes.")
        if self.text is not None and not Path(self.text).is_file():
            raise FileNotFoundError(f"There is no file {self.text}.")
        check_directory("--output", self.output)


def editors(settings: EditorsSettings) -> dict[str, Any]:
    """List the editors that ship, or make one."""
    console = make_console()
    if settings.build is None:
        names = shipped()
        for name in names or ["none"]:
            console.print(plain(name))
        return {"editors": names}
    model, tokenizer = load_model(settings)
    build(model, tokenizer, settings.output, data=settings.data, text=settings.text, restart=settings.restart)
    console.print(plain(f"What ships is {Path(settings.output) / 'editor'}"))
    return {"output": settings.output}
