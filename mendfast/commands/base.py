"""The base model that ``mendfast train`` makes where none is given: taught the data, made once, whole or absent."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..base_model import SHAPES, fit_base_model, make_base
from ..base_run import BaseRun
from ..choice import find_layers
from ..files import atomic_directory, read_json_bytes
from ..schema import brief, check_object, check_settings, parse_json
from ..tasks.task import Task
from ..training.data import digest

PRETRAINED_RATE = 2e-4
MADE = "made_by_mendfast.json"  # of what, beside the model
_WHOLE = (("config.json",), ("model.safetensors", "model.safetensors.index.json"), ("tokenizer_config.json",))


@dataclass(kw_only=True)
class BaseSettings:
    """Which base model is made."""

    base: str | None = field(
        default=None, metadata={"help": "shape of that small model (the task's first)", "choices": tuple(SHAPES)}
    )
    base_from: str | None = field(
        default=None, metadata={"help": "fine-tune this pretrained model on the data instead", "metavar": "MODEL"}
    )
    base_width: int = field(default=160, metadata={"help": "its width", "least": 1, "most": 1 << 14})
    base_depth: int = field(default=4, metadata={"help": "its number of blocks", "least": 1, "most": 1 << 10})
    base_vocabulary: int = field(default=4000, metadata={"help": "its number of tokens", "least": 1, "most": 1 << 20})
    base_steps: int = field(default=2600, metadata={"help": "optimiser steps of its training", "least": 1})


def base_model(
    task: Task,
    data: str,
    settings: BaseSettings,
    directory: Path,
    *,
    layers: list[str] | None,
    seed: int,
    limit: int | None = None,
    progress: bool = True,
    restart: bool = False,
) -> tuple[Any, Any]:
    """A small model that knows the task's data, or a pretrained one fine-tuned on it; made once per ``directory``.

    Args:
        data, limit: where ``task`` comes from, and how many facts of it.
        layers: the weights that it is to have for editing; None: any.
        restart: a model in the directory that was made of something else gives way to the new one, once that is made.

    Raises:
        ValueError: a shape that can't serve the task, layers that it won't have, a directory with another model or
            with something else; all before anything is trained.
    """
    import transformers as hf

    shape = settings.base or task.bases[0]
    if shape not in task.bases:
        raise ValueError(f"--base {shape} can't serve the task {task.key}; choose {' or '.join(task.bases)}.")
    kind = {
        "gpt2": hf.AutoModelForCausalLM,
        "t5": hf.AutoModelForSeq2SeqLM,
        "bert": hf.AutoModelForSequenceClassification,
    }[shape]
    pairs = task.base_pairs()
    read = {"task": task.key, "data": data, "limit": limit, "seed": seed, "pairs": digest(pairs)}
    made = _made(settings, shape, read)
    if _is_whole(directory, made, restart):
        return _load(kind, directory)
    run = BaseRun(directory.with_name(f"{directory.name}.unfinished.safetensors"), made)
    if restart:
        run.done()
    options = {"steps": settings.base_steps, "seed": seed, "append_eos": task.ends, "progress": progress, "run": run}
    if settings.base_from:
        model, tokenizer = _pretrained(kind, settings.base_from, shape, seed)
        find_layers(model, layers)
        fit_base_model(model, tokenizer, pairs, learning_rate=PRETRAINED_RATE, matrix_rate=None, **options)
    else:
        size = {"width": settings.base_width, "depth": settings.base_depth}
        with torch.device("meta"):
            planned = SHAPES[shape][0](8, heads=max(1, settings.base_width // 32), **size)
        find_layers(planned, layers)
        model, tokenizer = make_base(shape, pairs, vocabulary=settings.base_vocabulary, **size, **options)
    _remove_halves(directory)
    with atomic_directory(directory) as place:
        tokenizer.save_pretrained(place)
        model.save_pretrained(place)
        (place / MADE).write_text(json.dumps(made, indent=2) + "\n")
        if restart and (directory / MADE).is_file():
            shutil.rmtree(directory)
    run.done()
    return model, tokenizer


def _made(settings: BaseSettings, shape: str, data: dict[str, Any]) -> dict[str, Any]:
    """What a base model is made of, as far as the options say."""
    sizes = () if settings.base_from else ("base_width", "base_depth", "base_vocabulary")
    return {"base": shape, **data, **{name: getattr(settings, name) for name in ("base_from", "base_steps", *sizes)}}


def _is_whole(directory: Path, made: dict[str, Any], restart: bool) -> bool:
    """Whether the model is there already, made as it would be now."""
    if not directory.is_dir() or not any(directory.iterdir()):
        return False
    if missing := [names[0] for names in _WHOLE if not any((directory / name).is_file() for name in names)]:
        raise ValueError(
            f"{directory} holds no whole base model ({', '.join(missing)} missing); "
            "remove it, or choose another --output."
        )
    if not (directory / MADE).is_file():  # of a version that did not say
        return True
    before = check_object(parse_json(read_json_bytes(directory / MADE), str(directory / MADE)), str(directory / MADE))
    if "pairs" not in before:  # an older version's, which knew the data by its name
        made = {name: value for name, value in made.items() if name != "pairs"}
    if restart:
        return all(before.get(name) == value for name, value in made.items())
    advice = (
        f"pass the same ones, --model {directory} to take it as it is, --restart to make it anew, or another --output."
    )
    check_settings(f"{directory} holds a base model made", before, made, advice)
    return True


def _load(kind: Any, directory: Path) -> tuple[Any, Any]:
    import transformers as hf

    try:
        return kind.from_pretrained(directory).eval(), hf.AutoTokenizer.from_pretrained(directory)
    except MemoryError:
        raise
    except Exception as error:  # another library on damaged files
        raise ValueError(
            f"The base model in {directory} is damaged ({type(error).__name__}: {brief(error)}); remove it, or choose "
            "another --output."
        ) from error


def _pretrained(kind: Any, source: str, shape: str, seed: int) -> tuple[Any, Any]:
    import transformers as hf

    torch.manual_seed(seed)  # of the new head
    head = {"num_labels": 1} if shape == "bert" else {}
    try:
        return kind.from_pretrained(source, **head), hf.AutoTokenizer.from_pretrained(source)
    except MemoryError:
        raise
    except Exception as error:  # another library on files of unknown origin
        raise ValueError(
            f"--base-from {source} gives no {shape} model to start from ({type(error).__name__}: {brief(error)})"
        ) from error


def _remove_halves(directory: Path) -> None:
    """Remove what a killed run left of the directory that it was writing."""
    for half in directory.parent.glob(f".{directory.name}.*"):
        if half.is_dir():
            shutil.rmtree(half, ignore_errors=True)
