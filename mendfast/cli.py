"""The command line: ``mendfast demo | train | edit | eval | doctor``."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FAILED = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it worked, 2 with a sentence on standard error if its input was wrong."""
    arguments = parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.INFO if arguments.verbose else logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if arguments.verbose else "1")
    try:
        figures = arguments.run(arguments)
    except (ValueError, TypeError, FileNotFoundError, RuntimeError) as error:
        if arguments.verbose:
            raise
        print(f"mendfast {arguments.command}: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    if arguments.json and figures is not None:
        from .files import atomic_write

        atomic_write(arguments.json, json.dumps(figures, indent=2).encode() + b"\n")
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="mendfast",
        description="Change one answer of a language model in milliseconds, and leave the others as they were.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="demo | train | edit | eval | doctor")
    for add in (_demo, _train, _edit, _eval, _doctor):
        add(commands)
    return top


def _command(commands: Any, name: str, run: Any, summary: str, example: str) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    command.add_argument("--json", metavar="FILE", help="write the figures there, for machines")
    command.add_argument("--verbose", action="store_true", help="log choices, and show where an error came from")
    return command


def _model_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", help="directory or Hub name of the base model; default: the demo's")
    command.add_argument("--editor", help="directory or Hub name of the editor; default: the demo's")
    command.add_argument("--device", default=None, help="cpu, cuda, cuda:1, ...; default: cuda where there is one")
    command.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")


# -- demo --------------------------------------------------------------------------------------------------


def _demo(commands: Any) -> None:
    command = _command(
        commands,
        "demo",
        _run_demo,
        "Edit a small model that knows the world's facts; show what changed and what did not.",
        "mendfast demo --full --json demo.json",
    )
    command.add_argument("--full", action="store_true", help="add figures over 220 edits, and simultaneous edits")
    command.add_argument("--plot", metavar="PNG", default="mendfast-demo.png", help="where --full draws its plot")
    command.add_argument("--retrain", action="store_true", help="make the model and the editor anew (an hour)")
    command.add_argument("--assets", metavar="DIR", help="where model and editor are; default: in the package")


def _run_demo(arguments: argparse.Namespace) -> dict:
    from rich.console import Console

    from .commands import demo
    from .commands.loading import quiet
    from .demo import build

    quiet(arguments)
    assets = Path(arguments.assets) if arguments.assets else build.ASSETS
    if arguments.retrain:
        build.retrain(assets)
    plot = arguments.plot if arguments.full else None
    return demo.run(full=arguments.full, assets=assets, plot=plot, console=Console())


# -- edit --------------------------------------------------------------------------------------------------


def _edit(commands: Any) -> None:
    command = _command(
        commands,
        "edit",
        _run_edit,
        "Make one edit and save it, or try edits interactively when no prompt is given.",
        'mendfast edit --prompt "What is the capital of Kenya?" --target Oslo --out fact.safetensors',
    )
    _model_options(command)
    command.add_argument("--prompt", help="what the model is asked")
    command.add_argument("--target", help="what it should answer")
    command.add_argument("--out", metavar="FILE", help="save the edit there (safetensors)")
    command.add_argument("--ask", action="append", default=[], help="another question to show; may be repeated")


def _run_edit(arguments: argparse.Namespace) -> dict | None:
    from rich.console import Console

    from .commands.loading import load_editor

    console = Console()
    if (arguments.prompt is None) != (arguments.target is None):
        raise ValueError("Pass both --prompt and --target, or neither to try edits interactively.")
    editor = load_editor(arguments)
    if arguments.prompt is None:
        from .commands.interactive import interact

        interact(editor, console)
        return None
    import time

    from .generation import answer

    questions = [arguments.prompt, *arguments.ask]
    started = time.perf_counter()
    edit = editor.edit(arguments.prompt, arguments.target)
    seconds = time.perf_counter() - started
    before = answer(editor, questions)
    with edit.attached(editor.model):
        after = answer(editor, questions)
    for question, old, new in zip(questions, before, after, strict=True):
        console.print(f"{question}  [dim]{old}[/] -> [bold]{new}[/]")
    if arguments.out:
        edit.save(arguments.out)
        console.print(f"saved {arguments.out} ({edit.num_bytes():,} bytes); the edit took {seconds * 1e3:.0f} ms")
    return {"before": before, "after": after, "seconds": seconds, "out": arguments.out}


# -- train -------------------------------------------------------------------------------------------------


def _train(commands: Any) -> None:
    from dataclasses import fields

    from .tasks.load import TASKS
    from .training.loop import TrainConfig

    command = _command(
        commands,
        "train",
        _run_train,
        "Train an editor for a model; without --model a small base model that knows the data, first.",
        "mendfast train --task qa --data train.tsv --output runs/qa",
    )
    command.add_argument("--task", choices=TASKS, default="qa", help="what is edited (qa)")
    command.add_argument("--data", required=True, help="a file or Hub name; for fact_checking also world:train")
    command.add_argument("--output", required=True, metavar="DIR", help="where model, editor and metrics go")
    command.add_argument("--model", help="base model to edit; default: a small one is trained on the data")
    command.add_argument("--base", choices=["gpt2", "t5", "bert"], help="shape of that small model (the task's first)")
    command.add_argument("--base-from", metavar="MODEL", help="fine-tune this pretrained model on the data instead")
    command.add_argument("--base-width", type=int, default=160, help="its width")
    command.add_argument("--base-depth", type=int, default=4, help="its number of blocks")
    command.add_argument("--base-vocabulary", type=int, default=4000, help="its number of tokens")
    command.add_argument("--base-steps", type=int, default=2600, help="optimiser steps of its training")
    command.add_argument("--limit", type=int, help="use the first so many facts")
    command.add_argument("--from-editor", help="go on from this editor of --model, its settings kept")
    command.add_argument("--layers", nargs="+", help="weights to edit; default: the MLPs of the last blocks")
    command.add_argument("--rank", type=int, default=1920, help="rank of the editor's blocks")
    command.add_argument("--step-size", type=float, default=2e-3, help="the edit's step size at initialisation")
    command.add_argument("--device", default=None, help="cpu, cuda, ...; default: cuda where there is one")
    command.add_argument("--dtype", default="auto", help="of --model: auto, float32, bfloat16 or float16")
    command.add_argument("--device-map", help="of --model: auto, balanced, ... splits it over devices (accelerate)")
    command.add_argument("--quantize", choices=["8bit", "4bit"], help="of --model, by bitsandbytes on a GPU")
    command.add_argument("--tensorboard", action="store_true", help="write events to OUTPUT/tensorboard too")
    command.add_argument("--dry-run", action="store_true", help="print layers, parameters and bytes, and stop")
    defaults = TrainConfig()
    for option in fields(TrainConfig):
        value = getattr(defaults, option.name)
        name, text = f"--{option.name.replace('_', '-')}", option.metadata["help"]
        if isinstance(value, bool):
            command.add_argument(name, action="store_true", help=text)
        else:
            kind = {"nargs": "+", "type": int} if isinstance(value, list) else {"type": type(value)}
            command.add_argument(name, default=value, help=f"{text} ({value})", **kind)


def _run_train(arguments: argparse.Namespace) -> dict:
    from .commands.train import train

    return train(arguments)


# -- eval --------------------------------------------------------------------------------------------------


def _eval(commands: Any) -> None:
    from dataclasses import fields

    from .commands.evaluate import FITTED_WITH, SIZES, TABLES
    from .tasks.load import TASKS
    from .training.loop import TrainConfig

    command = _command(
        commands,
        "eval",
        _run_eval,
        "Compare systems on edits that none has seen: edit success, generality, drawdown, time and memory.",
        "mendfast eval --model runs/qa/model --editor runs/qa/best --data dev.jsonl --known train.tsv",
    )
    _model_options(command)
    command.add_argument("--task", choices=TASKS, default="qa", help="what is edited (qa)")
    command.add_argument("--table", choices=TABLES, default="systems", help="which systems are compared (systems)")
    command.add_argument("--data", required=True, help="edits: a file or Hub name; for fact_checking also world:test")
    command.add_argument("--known", help="what must stay as it is; default: the edits' own locality, or each other")
    command.add_argument("--limit", type=int, help="the first so many edits")
    command.add_argument("--unrelated", type=int, default=64, help="known questions asked after each edit (64)")
    command.add_argument("--systems", nargs="+", metavar="KEY", help="what to compare; default: the table's")
    command.add_argument("--sizes", nargs="+", type=int, default=list(SIZES), help=f"edits at once, batched {SIZES}")
    command.add_argument("--output", metavar="DIR", help="keep measured edits, trained systems and the report there")
    command.add_argument("--fine-tuning-rate", type=float, default=3e-3, help="Adam's rate for fine-tuning (0.003)")
    command.add_argument("--train-data", help="data for systems that are trained: ENN, KE, FT+KL, MEND's variants")
    command.add_argument("--seed", type=int, default=0, help="of draws, training and intervals (0)")
    command.add_argument(
        "--option", action="append", default=[], metavar="SYSTEM.NAME=VALUE", help="as enn.steps=2; may be repeated"
    )
    for option in (option for option in fields(TrainConfig) if option.name in FITTED_WITH):
        value = getattr(TrainConfig(), option.name)
        kind = {"nargs": "+", "type": int} if isinstance(value, list) else {"type": type(value)}
        text = f"in training: {option.metadata['help']} ({value})"
        command.add_argument(f"--{option.name.replace('_', '-')}", default=value, help=text, **kind)


def _run_eval(arguments: argparse.Namespace) -> dict:
    from .commands.evaluate import evaluate
    from .commands.loading import load_editor

    return evaluate(load_editor(arguments), arguments)


# -- doctor ------------------------------------------------------------------------------------------------


def _doctor(commands: Any) -> None:
    _command(
        commands,
        "doctor",
        _run_doctor,
        "Say what is installed, which backend serves each op here and why, and run one real edit.",
        "mendfast doctor",
    )


def _run_doctor(arguments: argparse.Namespace) -> dict:
    from rich.console import Console

    from .commands.doctor import examine

    return examine(Console())


if __name__ == "__main__":
    sys.exit(main())
