"""``mendfast train``: a base model that knows the data, where none is given, and an editor for it."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..base_model import fit_base_model, make_base
from ..config import MendConfig
from ..editor import MendEditor
from ..metrics import correct
from ..tasks.load import load_task
from ..tasks.task import FactTask, Task
from ..training import TrainConfig, Trainer
from ..training.processes import launched
from .evaluate import tell
from .loading import load_model

PRETRAINED_RATE = 2e-4
CHECKED = 1000  # known facts that the base model is asked before training


def train(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the command does; returns the last metrics.

    Raises:
        ValueError, FileNotFoundError: data that can't be read, or a model that can't serve the task.
    """
    accelerator = launched()
    main = accelerator is None or accelerator.is_main_process
    console, output = Console(quiet=not main), Path(arguments.output)
    if accelerator is not None and arguments.device is None:
        arguments.device = str(accelerator.device)
    read = {"limit": arguments.limit, "seed": arguments.seed}
    task = load_task(arguments.task, arguments.data, **read)
    tell(task.problems, console)
    if isinstance(task, FactTask):
        rephrased = sum(len(item.wordings) > 1 for item in task.items)
        console.print(f"{len(task.items):,} facts, {rephrased:,} of them in several wordings")
    if arguments.model:
        model, tokenizer = load_model(arguments.model, arguments)
    else:
        with accelerator.main_process_first() if accelerator else contextlib.nullcontext():
            model, tokenizer = base_model(task, arguments, output / "model", progress=main)
    if not isinstance(task, FactTask):  # cut in the model's own tokens
        task = load_task(arguments.task, arguments.data, tokenizer=tokenizer, **read)
    torch.manual_seed(arguments.seed)
    if arguments.from_editor:
        editor = MendEditor.from_pretrained(arguments.from_editor, model, tokenizer)
    else:
        config = MendConfig(
            layers=arguments.layers,
            rank=arguments.rank,
            step_size=arguments.step_size,
            scale_v=True,
            append_eos=task.ends and not arguments.model,
        )
        editor = MendEditor.from_model(model, tokenizer, config)
    task.check(model, editor.kind)
    settings = TrainConfig(**{f.name: getattr(arguments, f.name) for f in fields(TrainConfig)})
    trainer = Trainer(
        editor,
        task.sampler(settings.seed),
        settings,
        output=output,
        validation=task.sampler(settings.seed + 1, held_out=True),
        tensorboard=arguments.tensorboard,
        accelerator=accelerator,
    )
    planned = trainer.plan()
    show_plan(editor, planned, console)
    if arguments.dry_run:
        return {
            "layers": editor.config.layers,
            "parameters": sum(p.numel() for p in editor.parameters()),
            "bytes": planned,
        }
    figures: dict[str, Any] = {}
    if isinstance(task, FactTask):
        asked = [(item.wordings[0], item.answer) for item in task.items[:CHECKED]]
        figures["base_accuracy"] = correct(editor, asked).float().mean().item()
        console.print(f"The base model knows {figures['base_accuracy']:.1%} of the first {len(asked):,} facts.")
    if trainer.resume():
        console.print(f"Going on from step {trainer.step}.")
    started = time.perf_counter()
    metrics = trainer.run()
    where = "the GPU" if editor.device.type == "cuda" else "the process"
    console.print(f"Peak memory of {where}: {metrics['peak_bytes'] / 2**20:,.0f} MiB")
    return {**metrics, **figures, "seconds": time.perf_counter() - started}


def base_model(task: Task, arguments: argparse.Namespace, output: Path, progress: bool = True) -> tuple[Any, Any]:
    """A small model that knows the task's data, or a pretrained one fine-tuned on it; made once per ``output``."""
    import transformers as hf

    shape = arguments.base or task.bases[0]
    if shape not in task.bases:
        raise ValueError(f"--base {shape} can't serve the task {task.key}; choose {' or '.join(task.bases)}.")
    kind = {
        "gpt2": hf.AutoModelForCausalLM,
        "t5": hf.AutoModelForSeq2SeqLM,
        "bert": hf.AutoModelForSequenceClassification,
    }[shape]
    if (output / "model.safetensors").is_file():
        return kind.from_pretrained(output).eval(), hf.AutoTokenizer.from_pretrained(output)
    options = {"steps": arguments.base_steps, "seed": arguments.seed, "append_eos": task.ends, "progress": progress}
    if arguments.base_from:
        head = {"num_labels": 1} if shape == "bert" else {}
        torch.manual_seed(arguments.seed)  # of the new head
        tokenizer = hf.AutoTokenizer.from_pretrained(arguments.base_from)
        model = kind.from_pretrained(arguments.base_from, **head)
        fit_base_model(
            model, tokenizer, task.base_pairs(), learning_rate=PRETRAINED_RATE, matrix_rate=None, **options
        )
    else:
        model, tokenizer = make_base(
            shape,
            task.base_pairs(),
            vocabulary=arguments.base_vocabulary,
            width=arguments.base_width,
            depth=arguments.base_depth,
            **options,
        )
    tokenizer.save_pretrained(output)
    model.save_pretrained(output)
    return model, tokenizer


def show_plan(editor: MendEditor, planned: Mapping[str, int], console: Console) -> None:
    """Print the layers, the networks, and the bytes that training is predicted to hold."""
    table = Table(title="What is trained")
    for column in ("network", "layers", "parameters"):
        table.add_column(column)
    for key, network in editor.networks.items():
        names = [layer.name for layer in editor._groups[key]]
        table.add_row(key, ", ".join(names), f"{sum(p.numel() for p in network.parameters()):,}")
    console.print(table)
    parameters = sum(p.numel() for p in editor.parameters())
    kinds = ", ".join(f"{kind} {size / 2**20:,.1f}" for kind, size in planned.items() if kind != "total")
    console.print(f"{parameters:,} parameters; predicted memory {planned['total'] / 2**20:,.0f} MiB ({kinds})")
