"""What the checkpoints of all training runs have in common: the optimiser's state, and the settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..files import read_tensors, write_tensors


def write(
    path: Path,
    parameters: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    config: Any,
    progress: Mapping[str, float],
    **metadata: str,
) -> None:
    """Write one file, whole or not at all. ``config`` is a dataclass, ``progress`` what the loop counts."""
    tensors = {f"own:{name}": tensor for name, tensor in parameters.items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"adam:{i}:{name}": torch.as_tensor(value) for name, value in state.items()}
    settings = {"progress": json.dumps(progress), "config": json.dumps(asdict(config))}
    write_tensors(path, tensors, {"format": "mendfast.checkpoint", **settings, **metadata})


def read(
    path: Path, optimizer: torch.optim.Optimizer, config: Any, **metadata: str
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The parameters and the progress that :func:`write` was given; the optimiser gets its state.

    Raises:
        ValueError: the file was written with another ``config`` or other ``metadata``.
    """
    tensors, found = read_tensors(path, "checkpoint")
    defaults = asdict(type(config)())  # an older run lacks the newer settings
    saved = {**defaults, **json.loads(found["config"]), **{name: found.get(name) for name in metadata}}
    changed = [name for name, value in {**asdict(config), **metadata}.items() if saved[name] != value]
    if changed:
        raise ValueError(
            f"{path.parent} was trained with other settings ({', '.join(changed)}); "
            "resume with the same ones, or choose another output directory."
        )
    state = optimizer.state_dict()
    state["state"] = {}
    parameters = {}
    for name, tensor in tensors.items():
        kind, _, name = name.partition(":")
        if kind == "adam":
            i, _, key = name.partition(":")
            state["state"].setdefault(int(i), {})[key] = tensor
        else:
            parameters[name] = tensor
    optimizer.load_state_dict(state)
    return parameters, json.loads(found["progress"])
