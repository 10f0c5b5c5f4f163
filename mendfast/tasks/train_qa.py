"""``mendfast train --task qa``: a base model that knows the answers, and an editor for it."""

from __future__ import annotations

import argparse
import contextlib
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..config import MendConfig
from ..editor import MendEditor
from ..metrics import correct
from ..training import FactSampler, Item, TrainConfig, Trainer
from ..training.base import fit_base_model, small_gpt2, small_t5, train_tokenizer
from ..training.processes import launched
from .qa import QAExample, read_qa
from .wordings import Wordings, mine_wordings

VALIDATION_SHARE = 20  # one fact in so many
WORDINGS_PER_FACT = 4


def read_examples(source: str, limit: int | None, console: Console) -> list[QAExample]:
    """The data's examples; broken lines are counted on ``console`` and left out."""
    examples, problems = read_qa(source, limit=limit)
    for problem in problems[:5]:
        console.print(f"[yellow]{problem}[/]")
    if len(problems) > 5:
        console.print(f"[yellow]and {len(problems) - 5} more broken lines[/]")
    return examples


def fact_items(examples: Sequence[QAExample], seed: int = 0) -> tuple[list[Item], Wordings]:
    """Facts in the data's own rephrasings, or, where it has none, in the wordings of its other questions."""
    wordings = mine_wordings([(e.prompt, e.target) for e in examples])
    items = []
    for i, example in enumerate(examples):
        rng = random.Random(f"{seed}:{i}")
        drawn = (wordings.rephrase(example.prompt, rng) for _ in range(2 * WORDINGS_PER_FACT))
        others = list(example.rephrasings) or [w for w in dict.fromkeys(drawn) if w and w != example.prompt]
        split = wordings.split(example.prompt)
        items.append(
            Item(
                (example.prompt, *others[:WORDINGS_PER_FACT]),
                example.target,
                wordings.relation(example.prompt),
                example.subject or (split[1] if split else None),
            )
        )
    return items, wordings


def base_model(
    items: Sequence[Item], arguments: argparse.Namespace, output: Path, progress: bool = True
) -> tuple[Any, Any]:
    """A small model trained on every wording of every fact; made once per ``output``."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    kind = AutoModelForSeq2SeqLM if arguments.base == "t5" else AutoModelForCausalLM
    if (output / "model.safetensors").is_file():
        return kind.from_pretrained(output).eval(), AutoTokenizer.from_pretrained(output)
    pairs = [(wording, item.answer) for item in items for wording in item.wordings]
    torch.manual_seed(arguments.seed)
    tokenizer = train_tokenizer([f"{p} {t}" for p, t in pairs], arguments.base_vocabulary)
    make = small_t5 if arguments.base == "t5" else small_gpt2
    heads = max(1, arguments.base_width // 32)
    model = make(len(tokenizer), width=arguments.base_width, depth=arguments.base_depth, heads=heads)
    fit_base_model(model, tokenizer, pairs, steps=arguments.base_steps, seed=arguments.seed, progress=progress)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return model, tokenizer


def train(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the command does; returns the last metrics."""
    accelerator = launched()
    main = accelerator is None or accelerator.is_main_process
    console, output = Console(quiet=not main), Path(arguments.output)
    if accelerator is not None and arguments.device is None:
        arguments.device = str(accelerator.device)
    examples = read_examples(arguments.data, arguments.limit, console)
    items, _ = fact_items(examples, arguments.seed)
    rephrased = sum(len(item.wordings) > 1 for item in items)
    console.print(f"{len(items):,} facts, {rephrased:,} of them in several wordings")
    if arguments.model:
        from ..cli import load_model

        model, tokenizer = load_model(arguments.model, arguments)
    else:
        with accelerator.main_process_first() if accelerator else contextlib.nullcontext():
            model, tokenizer = base_model(items, arguments, output / "model", progress=main)
    config = MendConfig(
        layers=arguments.layers,
        rank=arguments.rank,
        step_size=arguments.step_size,
        scale_v=True,
        append_eos=not arguments.model,
    )
    torch.manual_seed(arguments.seed)
    if arguments.from_editor:
        editor = MendEditor.from_pretrained(arguments.from_editor, model, tokenizer)
    else:
        editor = MendEditor.from_model(model, tokenizer, config)
    settings = TrainConfig(**{f.name: getattr(arguments, f.name) for f in fields(TrainConfig)})
    training = [item for i, item in enumerate(items) if i % VALIDATION_SHARE]
    held_out = items[::VALIDATION_SHARE]
    trainer = Trainer(
        editor,
        FactSampler(training, neighbours=items, seed=settings.seed),
        settings,
        output=output,
        validation=FactSampler(held_out, neighbours=items, seed=settings.seed + 1),
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
    known = correct(editor, [(item.wordings[0], item.answer) for item in items[:1000]]).float().mean().item()
    console.print(f"The base model answers {known:.1%} of the first {min(1000, len(items)):,} questions.")
    if trainer.resume():
        console.print(f"Going on from step {trainer.step}.")
    started = time.perf_counter()
    metrics = trainer.run()
    where = "the GPU" if editor.device.type == "cuda" else "the process"
    console.print(f"Peak memory of {where}: {metrics['peak_bytes'] / 2**20:,.0f} MiB")
    return {**metrics, "base_accuracy": known, "seconds": time.perf_counter() - started}


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
    kinds = ", ".join(f"{kind} {size / 2**20:,.0f}" for kind, size in planned.items() if kind != "total")
    console.print(f"{parameters:,} parameters; predicted memory {planned['total'] / 2**20:,.0f} MiB ({kinds})")
