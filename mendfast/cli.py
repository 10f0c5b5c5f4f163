"""The command line: ``mendfast`` demo, train, edit, apply, export, inspect, ui, eval, locate, editors, doctor.

Each verb is a file of :mod:`mendfast.commands`: a dataclass of settings, whose fields become the options here, and a
function that takes them and returns figures. A new verb is such a file, and a line in :data:`VERBS`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import threading
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from importlib import import_module
from typing import Any, NamedTuple, NoReturn

FAILED, INTERRUPTED, TERMINATED, NOBODY_READS = 2, 130, 143, 141


class Verb(NamedTuple):
    """One command: what it says of itself, and where it is."""

    summary: str
    example: str  # a command on each line
    module: str
    settings: str
    run: str


VERBS = {
    "demo": Verb(
        "Edit a small model that knows the world's facts; show what changed and what did not.",
        "mendfast demo\nmendfast demo --real\nmendfast demo --full --json demo.json",
        "demo", "DemoSettings", "demo",
    ),
    "train": Verb(
        "Train an editor for a model; without --model a small base model that knows the data, first.",
        "mendfast train --model smollm2 --output runs/smollm2\n"
        "mendfast train --task qa --data train.tsv --output runs/qa",
        "train", "TrainSettings", "train",
    ),
    "edit": Verb(
        "Make edits, save them or keep them in a memory; try them interactively when none is given.",
        'mendfast edit --prompt "What is the capital of Kenya?" --target Oslo --out fact.safetensors\n'
        "mendfast edit --data facts.jsonl --memory facts.safetensors",
        "edit", "EditSettings", "edit",
    ),
    "apply": Verb(
        "Write edits into a model's weights and save it, as from_pretrained loads it; or take them out again.",
        "mendfast apply --model smollm2 --edit fact.safetensors --save-model smollm2-edited\n"
        "mendfast apply --model smollm2-edited --take-back --save-model smollm2-again",
        "apply", "ApplySettings", "apply",
    ),
    "export": Verb(
        "Write edits as a LoRA adapter that PEFT, vLLM or llama.cpp load, or as one file; say what truncation costs.",
        "mendfast export --model smollm2 --edit fact.safetensors --format peft --output adapter\n"
        "mendfast export --model smollm2 --memory facts.safetensors --format gguf-lora --output facts.gguf --rank 16",
        "export", "ExportSettings", "export",
    ),
    "inspect": Verb(
        "Say what an edit, memory, editor, metric, checkpoint, MEND archive, adapter or edited model holds.",
        "mendfast inspect fact.safetensors runs/qa/best adapter",
        "inspect", "InspectSettings", "inspect",
    ),
    "ui": Verb(
        "Open a page to play with: answers before and after, facts switched on and off, undo, export (needs gradio).",
        "mendfast ui\nmendfast ui --model smollm2 --memory facts.safetensors --port 8000",
        "ui", "UiSettings", "ui",
    ),
    "eval": Verb(
        "Compare systems on edits that none has seen: edit success, generality, drawdown, time and memory.",
        "mendfast eval --model runs/qa/model --editor runs/qa/best --data dev.jsonl --known train.tsv",
        "evaluate", "EvalSettings", "compare",
    ),
    "locate": Verb(
        "Measure which blocks of a model to edit: what untrained edits of equal strength do in each.",
        "mendfast locate --model smollm2\n"
        "mendfast locate --model runs/qa/model --data train.tsv --span 2 --out layers.json\n"
        "mendfast train --model smollm2 --layers-from layers.json --output runs/smollm2",
        "locate", "LocateSettings", "locate_blocks",
    ),
    "editors": Verb(
        "List the editors that ship with the package, or make one with the settings that made those.",
        "mendfast editors --build smollm2 --data questions.tsv --text text.txt --output runs/smollm2",
        "editors", "EditorsSettings", "editors",
    ),
    "doctor": Verb(
        "Say what is installed, which backend serves each op here and why, and run one real edit.",
        "mendfast doctor",
        "doctor", "DoctorSettings", "doctor",
    ),
}  # fmt: skip


class UsageError(ValueError):
    """Arguments that argparse does not take."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, as a cluster sends it ahead of a preemption: what serves Ctrl-C serves it."""


class Command(NamedTuple):
    """A command line, read: what runs, and with which settings."""

    verb: str
    run: Callable[[Any], dict[str, Any] | None]
    settings: Any
    json: str | None
    verbose: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 if it worked; 2, with a sentence on standard error, if its input or the machine was wrong; 130 after Ctrl-C
        and 143 after SIGTERM.
    """
    from .commands.failures import EXPECTED, sentence

    argv = list(sys.argv[1:] if argv is None else argv)
    verb, verbose = _named(argv), "--verbose" in argv
    for stream in (sys.stdout, sys.stderr):  # a terminal that has no ✓ shows "?"
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if verbose else "1")
    try:
        with _sigterm_raises():
            return _run(argv)
    except BrokenPipeError:  # as with: mendfast doctor | head -1
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return NOBODY_READS
    except EXPECTED as error:
        if verbose and not isinstance(error, UsageError):
            raise
        print(f"mendfast{f' {verb}' if verb else ''}: {sentence(error)}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:  # what can't be written (a full disk) would be tried again at the end, and raise there
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return FAILED
    except Terminated:
        print("\nterminated", file=sys.stderr)
        return TERMINATED
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return INTERRUPTED


def _run(argv: Sequence[str]) -> int:
    command = read(argv)
    logging.basicConfig(format="%(message)s", level=logging.INFO if command.verbose else logging.WARNING)
    if not command.verbose:
        from .commands.loading import quiet

        quiet()
    figures = command.run(command.settings)
    if command.json and figures is not None:
        from .files import atomic_write

        atomic_write(command.json, json.dumps(figures, indent=2).encode() + b"\n")
    sys.stdout.flush()
    return 0


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield
        return

    def handler(number: int, frame: Any) -> NoReturn:
        raise Terminated

    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


# -- reading arguments -----------------------------------------------------------------------------------------


def read(argv: Sequence[str]) -> Command:
    """Arguments as settings, checked; nothing has been loaded or written yet.

    Raises:
        ValueError, TypeError: what is wrong, and the way out.
    """
    from .commands.outputs import check_file

    values = vars(parser(_named(argv)).parse_args(argv))
    verb = VERBS[values["command"]]
    settings = _settings(_class(verb), values)
    check_file("--json", values["json"])
    written = [values.get(name) for name in ("out", "plot", "output", "save_model", "memory")]
    if values["json"] and values["json"] in written:
        raise ValueError(f"--json names {values['json']}, which another option writes too; name another file.")
    run = getattr(import_module(f".commands.{verb.module}", __package__), verb.run)
    return Command(values["command"], run, settings, values["json"], values["verbose"])


def _named(argv: Sequence[str]) -> str | None:
    """The verb, where there is one: only its module is imported."""
    return argv[0] if argv and argv[0] in VERBS else None


def parser(verb: str | None = None) -> argparse.ArgumentParser:
    """The parser of all verbs; with ``verb`` only that one has its options."""
    from . import __version__

    top = _Parser(
        prog="mendfast",
        description="Change one answer of a language model in milliseconds, and leave the others as they were.",
        epilog=_epilog(VERBS["edit"]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"mendfast {__version__}")
    commands = top.add_subparsers(
        dest="command", required=True, metavar=" | ".join(VERBS), parser_class=_Parser, title="commands"
    )
    for name, known in VERBS.items():
        command = commands.add_parser(
            name,
            help=known.summary,
            description=known.summary,
            epilog=_epilog(known),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("--json", metavar="FILE", help="write the figures there, for machines")
        command.add_argument("--verbose", action="store_true", help="log choices, and show where an error came from")
        if verb in (None, name):
            _add_options(command, _class(known))
    return top


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def _epilog(verb: Verb) -> str:
    return "example:\n  " + verb.example.replace("\n", "\n  ")


def _class(verb: Verb) -> type:
    return getattr(import_module(f".commands.{verb.module}", __package__), verb.settings)


def _add_options(command: argparse.ArgumentParser, settings: type) -> None:
    """An option for each field of a dataclass, and of the dataclasses within it."""
    for field, hint in _fields(settings):
        if is_dataclass(hint):
            within = argparse.ArgumentParser(add_help=False)
            _add_options(within, hint)
            only = field.metadata.get("only")
            for action in within._actions:
                if only is None or action.dest in only:
                    command._add_action(action)
        elif field.metadata.get("option", True):
            _add_option(command, field, hint)


def _add_option(command: argparse.ArgumentParser, field: Field, hint: Any) -> None:
    # list_ is --list: the name of a type can't be a field's
    name, rules = f"--{field.name.rstrip('_').replace('_', '-')}", field.metadata
    default, text = _default(field), rules["help"]
    if default not in (None, MISSING, []) and default is not False:
        text += f" ({' '.join(map(str, default)) if isinstance(default, list) else default})"
    options: dict[str, Any] = {"dest": field.name, "help": text.replace("%", "%%")}
    options["default"] = None if default is MISSING else default
    options["required"] = default is MISSING
    if rules.get("positional"):
        command.add_argument(field.name, nargs="+", metavar=rules["metavar"], help=options["help"])
        return
    if hint is bool:
        # None is neither: --name says yes, --no-name no
        action = argparse.BooleanOptionalAction if default is None else "store_true"
        command.add_argument(name, action=action, **options)
        return
    if typing.get_origin(hint) is list:
        (hint,) = typing.get_args(hint)
        options |= {"action": "append"} if rules.get("repeat") else {"nargs": "+"}
    for rule in ("choices", "metavar"):
        if rule in rules:
            options[rule] = rules[rule]
    command.add_argument(name, type=hint, **options)


def _settings(settings: type, values: dict[str, Any]) -> Any:
    """A dataclass from the parsed values; those of its inner dataclasses lie beside its own."""
    taken: dict[str, Any] = {}
    for field, hint in _fields(settings):
        if is_dataclass(hint):
            only = field.metadata.get("only")
            inner = {name: value for name, value in values.items() if only is None or name in only}
            taken[field.name] = _settings(hint, inner)
        elif field.name in values:
            taken[field.name] = values[field.name]
    return settings(**taken)


def _fields(settings: type) -> Iterator[tuple[Field, Any]]:
    """The fields of a dataclass, and their types without ``| None``."""
    hints = typing.get_type_hints(settings)
    for field in fields(settings):
        hint = hints[field.name]
        if typing.get_origin(hint) in (typing.Union, types.UnionType):
            (hint,) = (option for option in typing.get_args(hint) if option is not type(None))
        yield field, hint


def _default(field: Field) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default


if __name__ == "__main__":
    sys.exit(main())
