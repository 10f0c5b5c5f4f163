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
from ..generation import answer
from ..labels import chat_prompt, end_of_turn
from ..metric import Metric
from ..own_words import own_words
from ..schema import check_object, check_settings, parse_json
from ..tasks import world
from ..tasks.load import load_task
from ..tasks.sieve import fitting, sieve
from ..training import FactSampler, FormSampler, Item, TrainConfig, Trainer
from ..training.data import digest
from ..training.learner import base_model_digest
from ..training.lock import occupied
from .console import make_console, plain
from .evaluate import tell
from .loading import LoadSettings, load_model
from .outputs import check_directory

SYSTEMS = (
    "You are a helpful assistant.",
    "Answer the question in as few words as you can.",
    "You are an expert who answers truthfully and briefly.",
)
FORMS = {"chat": 0.6, "plain": 0.2, **{f"system:{text}": 0.2 / len(SYSTEMS) for text in SYSTEMS}}
EDITED = slice(-12, -1)  # blocks; the last one's edits change other answers as much, and say no target
EDITOR = MendConfig(
    rank=192,
    scale_v=True,
    chat=True,
    forms=["chat", "plain"],
    rows="answers",
    aggregation="least_squares",
    protect_rank=230,
    ridge=1e-4,
    protection=60.0,
)
TRAINING = TrainConfig(
    steps=320,
    batch_size=8,
    joint=[1, 1, 1, 1, 8, 8, 8, 32, 96, 256],
    learning_rate=1e-3,
    alpha_learning_rate=2e-2,
    calibrate=True,
    warmup=10,
    c_loc=8.0,
    c_loc_decay=0.5,
    loc_root=True,
    validate_every=80,
    validation_size=24,
    checkpoint_every=10,
    cache_bytes=4 << 30,
    loc_positions=12,
    loc_answers=True,
)
_MARK = "mendfast-was-here"
WORDS, BEGINNING = 40, 8  # of a piece of running text; how many of them stand for its prompt
PROTECTED, PIECES = 3000, 2240  # questions, and pieces of running text
EDITABLE, WORDINGS = 1500, 2  # facts that edits are drawn from, so that their texts come back; wordings of each
SAMPLED = 1024  # conversations of the model with itself
ANSWERED, SAID = 2000, 24  # questions that it answers by itself, in so many tokens


def pieces(path: str | Path, count: int, rng: random.Random) -> list[tuple[str, str, str]]:
    """Pieces of running text as (beginning, rest, "text")."""
    words = [line.split() for line in Path(path).read_text().splitlines()]
    starts = [(line, i) for line in words if len(line) >= WORDS for i in range(0, len(line) - WORDS + 1, WORDS)]
    chosen = rng.sample(starts, min(count, len(starts)))
    return [
        (" ".join(line[i : i + BEGINNING]), " " + " ".join(line[i + BEGINNING : i + WORDS]), "text")
        for line, i in chosen
    ]


def conversations(model: Any, tokenizer: Any, path: Path, count: int) -> list[tuple[str, str, str]]:
    """The model's own words, as (user's turn, its answer, "chat"), sampled once and kept in ``path``."""
    if not path.is_file():
        before, _, between = chat_prompt(tokenizer, _MARK).partition(_MARK)
        end, found = end_of_turn(tokenizer), []
        for batch in own_words(model, tokenizer, samples=count, max_new_tokens=48, batch_size=64, progress=None):
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                asked, _, said = tokenizer.decode(ids[mask != 0]).removeprefix(before).partition(between)
                said = said.partition(end)[0].strip()
                if asked.strip() and said:
                    found.append((asked.strip(), said, "chat"))
        atomic_write(path, json.dumps(found, indent=0).encode())
    return [tuple(turn) for turn in json.loads(path.read_text())]


def own_answers(subject: EditableModel, questions: list[str], path: Path) -> list[tuple[str, str, str]]:
    """The model's own greedy answers, as (question, answer, "chat"), found once and kept in ``path``."""
    if not path.is_file():
        found: list[str] = []
        questions = sorted(questions, key=len)
        for i in range(0, len(questions), 256):
            found += answer(subject, questions[i : i + 256], SAID)
        said = [(question, text, "chat") for question, text in zip(questions, found, strict=True) if text.strip()]
        atomic_write(path, json.dumps(said, indent=0).encode())
    return [tuple(turn) for turn in json.loads(path.read_text())]


def layers_of(model: Any) -> list[str]:
    """The MLPs' output projections in the eleven blocks before the last (of a smaller model in those that it has):
    their inputs are the widest there are, so that two questions have the least in common."""
    _, blocks = blocks_of(model)[-1]
    return [weights[-1] for _, weights in blocks[EDITED] or blocks]


def facts(data: str | None, seed: int) -> list[Item]:
    """The world's facts that editors may train on, and those of ``data``."""
    items = world.items(world.splits()[0])
    if data:
        items += load_task("qa", data, seed=seed).items
    return items


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
    """Train an editor for a chat model; an interrupted run goes on. What ships is then in ``output/best``.

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
    rng = random.Random(training.seed)
    kept_metric, made_of = output / "metric.safetensors", output / "made_of.json"
    if restart:
        for path in (output / "own_words.json", output / "own_answers.json", kept_metric, made_of):
            path.unlink(missing_ok=True)
    _check_made_of(made_of, model, tokenizer, data, text, editor, training)
    own = conversations(model, tokenizer, output / "own_words.json", SAMPLED)
    running = pieces(text, 2 * SAMPLED + PIECES, rng) if text else []
    torch.manual_seed(training.seed)
    if editor.layers is None:
        editor = replace(editor, layers=layers_of(model))
    made = MendEditor.from_model(model, tokenizer, editor)
    running, own = fitting(made, running), fitting(made, own)
    items, problems = sieve(made, facts(data, training.seed), list(FORMS))
    tell(problems, make_console())
    rng.shuffle(items)
    questions = [(item.wordings[0], item.answer) for item in rng.sample(items, min(len(items), PROTECTED))]
    # and of what everybody asks first, where an edit is seen to leak
    askable = set(items)
    known = [item for item in facts(None, training.seed) if item in askable]
    known = rng.sample(known, min(len(known), PROTECTED))
    questions += [(wording, item.answer) for item in known for wording in item.wordings[:WORDINGS]]
    # and of what the model says by itself, whose first tokens are those that an edit moves most
    asked = [item.wordings[0] for item in rng.sample(items, min(len(items), ANSWERED))]
    own += fitting(made, own_answers(made, asked, output / "own_answers.json"))
    chosen = [*rng.sample(running, min(len(running), PIECES)), *own]
    if kept_metric.is_file():
        made.protect_with(Metric.load(kept_metric))
    else:
        made.protect([*questions, *chosen], answers=True, progress=None).save(kept_metric)
    texts = [*rng.sample(running, min(len(running), len(own) // 4)), *own]
    editable = [replace(item, wordings=item.wordings[:WORDINGS]) for item in items if len(item.wordings) > 1]
    editable = editable[:EDITABLE] or items
    held_out, kept = editable[::20], [item for i, item in enumerate(editable) if i % 20] or editable
    samplers = [
        FormSampler(
            FactSampler(part, neighbours=editable, loc=2, include_inner=0.4, targets=1, seed=seed),
            forms=FORMS,
            inner={"chat": 1.0},  # as the editor, which has ``chat``, will be asked
            texts=texts,
        )
        for part, seed in ((kept, training.seed), (held_out, training.seed + 1))
    ]
    trainer = Trainer(made, samplers[0], training, output=output, validation=samplers[1])
    if restart:
        trainer.restart()
    else:
        trainer.resume()
    trainer.run()
    return made


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
    console.print(plain(f"What ships is {Path(settings.output) / 'best'}"))
    return {"output": settings.output}
