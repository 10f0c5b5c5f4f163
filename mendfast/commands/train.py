"""``mendfast train``: a base model that knows the data, where none is given, and an editor for it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from ..config import AGGREGATIONS, ROWS, MendConfig
from ..editor import MendEditor
from ..metrics import correct
from ..tasks.load import TASKS, load_task
from ..tasks.task import FactTask, Task
from ..training import FormSampler, MixedSampler, Sampler, TrainConfig, Trainer
from ..training.lock import occupied
from ..training.processes import together
from .base import BaseSettings, base_model
from .console import make_console, plain
from .evaluate import SEEDS, tell
from .loading import LoadSettings, load_model, option
from .locate import layers_from
from .outputs import check_directory

if TYPE_CHECKING:
    from accelerate import Accelerator

PROTECTED = 200  # questions of the data, where edits are aggregated by least squares
CHECKED = 1000  # known facts that the base model is asked before training
MOST_PARAMETERS = 1 << 32  # of a small base model
STEP_SIZE = 2e-3
HEAD_WIDTH = 32  # of the small base models' attention


@dataclass(kw_only=True)
class TrainSettings(BaseSettings, LoadSettings):
    """What ``mendfast train`` is asked."""

    task: str = field(default="qa", metadata={"help": "what is edited", "choices": TASKS})
    data: str | None = field(
        default=None,
        metadata={"help": "a file or Hub name; default: world:train, the facts that come with the package"},
    )
    output: str = field(metadata={"help": "where model, editor and metrics go", "metavar": "DIR"})
    model: str | None = field(
        default=None,
        metadata={
            "help": "base model to edit: a directory, a Hub name, a FILE.gguf, or smollm2; default: a small one is "
            "trained on the data"
        },
    )
    limit: int | None = field(default=None, metadata={"help": "use the first so many facts", "least": 1})
    from_editor: str | None = field(
        default=None,
        metadata={
            "help": "go on from this editor of --model, its settings kept; with --aggregation least_squares one that "
            "sums is converted"
        },
    )
    layers: list[str] | None = field(
        default=None, metadata={"help": "weights to edit; default: the MLPs of the last blocks"}
    )
    layers_from: str | None = field(
        default=None, metadata={"help": "those that mendfast locate chose", "metavar": "JSON"}
    )
    rank: int = field(default=1920, metadata={"help": "rank of the editor's blocks", "least": 1})
    step_size: float | None = field(
        default=None,
        metadata={
            "help": "the edit's step size at initialisation; default: 2e-3, and for --model the best on a few draws",
            "least": 0,
        },
    )
    aggregation: str = field(
        default="sum",
        metadata={
            "help": "simultaneous edits as their sum (the paper), or by least squares under what must stay: the data's "
            "first questions, and the model's own words",
            "choices": AGGREGATIONS,
        },
    )
    chat: bool | None = field(
        default=None,
        metadata={"help": "ask through the tokenizer's chat template, or not; default: if it has one"},
    )
    forms: list[str] | None = field(
        default=None,
        metadata={"help": "forms that each edit is made in and trained for, together: chat, plain, system:TEXT"},
    )
    implied: float = field(
        default=0.0,
        metadata={
            "help": "share of edits that are trained for what follows from them too (the data's portability, or the "
            "world's facts: a new capital of France is the capital of France), where something does",
            "least": 0,
            "most": 1,
        },
    )
    long: float = field(
        default=0.0,
        metadata={
            "help": "share of edits whose targets are a sentence to a paragraph: of the world's facts written out, and "
            "of --text (--task long has no others)",
            "least": 0,
            "most": 0.95,
        },
    )
    text: str | None = field(
        default=None, metadata={"help": "for --long: running text too, a file or Hub name, one passage to a line"}
    )
    rows: str = field(
        default="all",
        metadata={
            "help": "the tokens that an edit is made of: all that the loss reaches (the paper), or those of its "
            "answer, which serve many edits at once by least squares",
            "choices": ROWS,
        },
    )
    tensorboard: bool = field(default=False, metadata={"help": "write events to OUTPUT/tensorboard too"})
    offload: bool = field(
        default=False,
        metadata={
            "help": "leave the blocks below the edited ones on disk: a model that does not fit into memory is trained "
            "on with --prefill, which takes them one after the other"
        },
    )
    restart: bool = field(
        default=False,
        metadata={"help": "start anew where OUTPUT holds a run; a base model made of the same is kept"},
    )
    dry_run: bool = field(default=False, metadata={"help": "print layers, parameters and bytes, and stop"})
    training: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.data is None:
            if self.task == "generation":
                raise ValueError("--task generation needs --data: running text to train on.")
            self.data = "world:train"
        if self.implied and self.task != "qa":
            raise ValueError(f"--implied is of question answering, and --task is {self.task}; leave it out.")
        if self.long and self.task != "qa":
            raise ValueError(f"--long is a share beside question answering, and --task is {self.task}; leave it out.")
        if self.text is not None and not self.long:
            raise ValueError("--text is of --long, the share of edits with long targets; pass both, or neither.")
        super().__post_init__()
        if self.layers_from is not None:
            self._refuse(["layers"], "says what --layers-from says too")
            self.layers = layers_from(self.layers_from)
        if self.model and self.step_size is None and not self.from_editor:
            self.training = replace(self.training, calibrate=True)
        self.editor_config(append_eos=False)
        alone = ["base", "base_from", "base_width", "base_depth", "base_vocabulary", "base_steps"]
        if self.model:
            self._refuse(alone, "makes a base model, and --model is given")
        elif self.offload:
            raise ValueError("--offload leaves blocks of --model on disk, and no --model is given; pass one.")
        if self.base_from:
            self._refuse(["base_width", "base_depth", "base_vocabulary"], "is of a new model, and --base-from has one")
        if self.from_editor:
            if not self.model:
                raise ValueError("--from-editor is an editor of --model; pass both.")
            new = ["layers", "layers_from", "rank", "step_size", "chat", "forms", "rows"]
            self._refuse(new, "is of a new editor, and --from-editor keeps its own")
        parameters = 12 * self.base_depth * self.base_width**2 + self.base_vocabulary * self.base_width
        if parameters > MOST_PARAMETERS:
            raise ValueError(
                f"base_width {self.base_width}, base_depth {self.base_depth} and base_vocabulary "
                f"{self.base_vocabulary} make a base model of {parameters:,} parameters, and {MOST_PARAMETERS:,} is "
                "the limit; take less of one."
            )
        heads = max(1, self.base_width // HEAD_WIDTH)
        if self.base_width % heads:
            raise ValueError(
                f"base_width is {self.base_width}, which {heads} heads can't share; "
                f"take {self.base_width // heads * heads}, or a multiple of {HEAD_WIDTH}."
            )
        low, high = SEEDS["least"], SEEDS["most"]
        if not low <= self.training.seed <= high:
            raise ValueError(f"seed is {self.training.seed}; it must be from {low} to {high}.")
        for joint in self.training.joint:
            if self.training.groups(joint) % self.training.accumulate:
                raise ValueError(
                    f"batch_size {self.training.batch_size} makes {self.training.groups(joint)} edits of {joint} at "
                    f"once, which accumulate {self.training.accumulate} can't share evenly; use a batch_size that is "
                    f"a multiple of {joint * self.training.accumulate}."
                )
        if self.tensorboard and find_spec("tensorboard") is None:
            raise ValueError("--tensorboard needs tensorboard: pip install tensorboard")
        check_directory("--output", self.output)
        check_directory("--output", str(Path(self.output) / "model"))

    def editor_config(self, append_eos: bool) -> MendConfig:
        """The new editor's configuration."""
        return MendConfig(
            layers=self.layers,
            rank=self.rank,
            step_size=STEP_SIZE if self.step_size is None else self.step_size,
            scale_v=True,
            append_eos=append_eos,
            aggregation=self.aggregation,
            chat="auto" if self.chat is None else self.chat,
            forms=self.forms,
            rows=self.rows,
        )

    def _refuse(self, names: list[str], why: str) -> None:
        """Refuse options that would be ignored."""
        for f in fields(self):
            if f.name in names and f.default is not MISSING and getattr(self, f.name) != f.default:
                raise ValueError(f"{option(f.name)} {why}; leave one of the two out.")


def train(settings: TrainSettings) -> dict[str, Any]:
    """What the command does; returns the last metrics.

    Raises:
        ValueError, FileNotFoundError: data that can't be read, or a model that can't serve the task.
        Occupied: another training is at work in the output directory.
    """
    with together() as accelerator:
        main = accelerator is None or accelerator.is_main_process
        with occupied(settings.output) if main else contextlib.nullcontext():
            return _train(settings, accelerator, main)


def _train(settings: TrainSettings, accelerator: Accelerator | None, main: bool) -> dict[str, Any]:
    console, output = make_console(quiet=not main), Path(settings.output)
    config = settings.training
    read = {"limit": settings.limit, "seed": config.seed}
    task = load_task(settings.task, settings.data, **read)
    tell(task.problems, console)
    texts = [name for name in ("world:train", settings.text) if settings.long and name is not None]
    longer = [load_task("long", name, seed=config.seed) for name in texts]
    if isinstance(task, FactTask):
        task.implied = settings.implied
        if settings.implied:
            task.sampler(config.seed)  # refuses data from which nothing follows, before anything is made
        task.beside = [pair for part in longer for pair in part.base_pairs()]
        rephrased = sum(len(item.wordings) > 1 for item in task.items)
        follows = sum(bool(item.implied) for item in task.items)
        console.print(
            f"{len(task.items):,} facts, {rephrased:,} of them in several wordings"
            + (f", and from edits of {follows:,} something follows" if settings.implied else "")
        )
    if settings.model:
        device = str(accelerator.device) if accelerator else None
        model, tokenizer = load_model(settings, device, offload=settings.offload and (settings.layers or True))
    else:
        with accelerator.main_process_first() if accelerator else contextlib.nullcontext():
            model, tokenizer = base_model(
                task, settings.data, settings, output / "model",
                layers=settings.layers, **read, progress=main, restart=settings.restart,
            )  # fmt: skip
    if not isinstance(task, FactTask):  # cut in the model's own tokens
        task = load_task(settings.task, settings.data, tokenizer=tokenizer, **read)
    torch.manual_seed(config.seed)
    if settings.from_editor:
        editor = MendEditor.from_pretrained(settings.from_editor, model, tokenizer)
        if settings.aggregation == "least_squares" != editor.config.aggregation:
            editor = editor.aggregating("least_squares")
    else:
        append_eos = task.ends and not settings.model
        editor = MendEditor.from_model(model, tokenizer, settings.editor_config(append_eos))
    task.check(model, editor.kind)
    tell(task.sieve(editor), console)
    if editor.config.aggregation == "least_squares" and editor.metric is None:
        editor.protect(task.base_pairs()[:PROTECTED], progress=None)
        if editor.kind == "causal":
            editor.protect(progress=None)  # and its own words
    samplers = task.sampler(config.seed), task.sampler(config.seed + 1, held_out=True)
    if longer:
        for part in longer:
            tell(part.sieve(editor), console)
        samplers = _mixed(samplers, longer, settings.long, config.seed)
    if editor.config.forms and isinstance(task, FactTask):
        samplers = tuple(FormSampler(sampler, forms=dict.fromkeys(editor.forms, 1.0)) for sampler in samplers)
    trainer = Trainer(
        editor,
        samplers[0],
        config,
        output=output,
        validation=samplers[1],
        tensorboard=settings.tensorboard,
        accelerator=accelerator,
    )
    planned = trainer.plan()
    show_plan(editor, planned, console)
    if settings.dry_run:
        cache = trainer.plan_cache()
        if cache:
            console.print(
                f"The cache of the frozen part: at most {cache['texts']:,} texts, {cache['bytes'] / 2**20:,.1f} MiB; "
                f"{cache['in memory'] / 2**20:,.1f} MiB in memory (--cache-bytes), beside the above, and "
                f"{cache['on disk'] / 2**20:,.1f} MiB on disk (--cache-disk-bytes)"
            )
        return {
            "layers": editor.config.layers,
            "parameters": sum(p.numel() for p in editor.parameters()),
            "bytes": planned,
            "cache": cache,
        }
    figures: dict[str, Any] = {}
    if isinstance(task, FactTask):
        asked = [(item.wordings[0], item.answer) for item in task.items[:CHECKED]]
        figures["base_accuracy"] = correct(editor, asked).float().mean().item()
        console.print(f"The base model knows {figures['base_accuracy']:.1%} of the first {len(asked):,} facts.")
    if settings.restart:
        trainer.restart()
    elif trainer.resume():
        console.print(f"Going on from step {trainer.step}.")
    started = time.perf_counter()
    metrics = trainer.run()
    if said := trainer.summary():
        console.print(plain(said))
    where = "the GPU" if editor.device.type == "cuda" else "the process"
    console.print(f"Peak memory of {where}: {metrics['peak_bytes'] / 2**20:,.0f} MiB")
    return {**metrics, **figures, "seconds": time.perf_counter() - started}


def _mixed(samplers: Sequence[Sampler], longer: Sequence[Task], share: float, seed: int) -> tuple[Sampler, ...]:
    """The samplers of training and validation with ``share`` of their edits from ``longer``."""
    found = []
    for i, sampler in enumerate(samplers):
        parts = [(part.sampler(seed + i, held_out=bool(i)), share / len(longer)) for part in longer]
        found.append(MixedSampler([(sampler, 1 - share), *parts], seed=seed + i))
    return tuple(found)


def show_plan(editor: MendEditor, planned: Mapping[str, int], console: Console) -> None:
    """Print the layers, the networks, and the bytes that training is predicted to hold."""
    table = Table(title="What is trained")
    for column in ("network", "layers", "parameters"):
        table.add_column(column)
    for key, network in editor.networks.items():
        names = [layer.name for layer in editor._groups[key]]
        table.add_row(key, plain(", ".join(names)), f"{sum(p.numel() for p in network.parameters()):,}")
    console.print(table)
    parameters = sum(p.numel() for p in editor.parameters())
    kinds = ", ".join(f"{kind} {size / 2**20:,.1f}" for kind, size in planned.items() if kind != "total")
    console.print(f"{parameters:,} parameters; predicted memory {planned['total'] / 2**20:,.0f} MiB ({kinds})")
