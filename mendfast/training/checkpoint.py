"""What the checkpoints of all training runs have in common: the optimiser's state, and the settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from ..files import read_tensors, write_tensors
from ..schema import brief, check_object, parse_json, shape_of, shown, some

COUNTS = ("step", "skipped", "stale")
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def write(
    path: Path,
    parameters: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    config: Any,
    progress: Mapping[str, float],
    run: Mapping[str, Any] | None = None,
    **metadata: str,
) -> None:
    """Write one file, whole or not at all. ``config`` is a dataclass, ``progress`` what the loop counts, ``run`` what
    else makes the run what it is, as JSON takes it."""
    tensors = {f"own:{name}": tensor for name, tensor in parameters.items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"adam:{i}:{name}": torch.as_tensor(value) for name, value in state.items()}
    settings = {"progress": json.dumps(progress), "config": json.dumps(asdict(config)), "run": json.dumps(run or {})}
    write_tensors(path, tensors, {"format": "mendfast.checkpoint", "format_version": "1", **settings, **metadata})


def read(
    path: Path,
    optimizer: torch.optim.Optimizer,
    config: Any,
    run: Mapping[str, Any] | None = None,
    **metadata: str,
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The parameters and the progress that :func:`write` was given; the optimiser gets its state.

    Raises:
        ValueError: the file was written with another ``config`` (in fields that are not "free"), another ``run`` or
            other ``metadata``, or is damaged: whatever an optimiser's step would write through is held to the shape
            and dtype of its parameter.
    """
    tensors, found = read_tensors(path, "checkpoint")
    if missing := [name for name in ("config", "progress") if name not in found]:
        raise _damaged(path, f"lacks {', '.join(missing)}")
    defaults = asdict(type(config)())  # an older run lacks the newer settings
    settings = check_object(parse_json(found["config"], f"The configuration in {path}"), f"The configuration in {path}")
    progress = check_object(parse_json(found["progress"], f"The progress in {path}"), f"The progress in {path}")
    saved = {**defaults, **settings, **{name: found.get(name) for name in metadata}}
    free = {f.name for f in fields(config) if f.metadata.get("free")}
    now = {**{name: value for name, value in asdict(config).items() if name not in free}, **metadata}
    _check_same(path, saved, now)
    if "run" in found:  # an older one does not say
        _check_same(path, check_object(parse_json(found["run"], f"The run in {path}"), f"The run in {path}"), run or {})
    _check_progress(progress, path)
    state = optimizer.state_dict()
    parameters = {}
    states: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(":")
        if kind == "adam":
            i, _, key = rest.partition(":")
            states.setdefault(i, {})[key] = tensor
        elif kind == "own":
            parameters[rest] = tensor
        else:
            raise _damaged(path, f"holds the tensor {shown(name)}")
    state["state"] = _checked_states(states, optimizer, path)
    optimizer.load_state_dict(state)
    return parameters, progress


def _check_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """What makes a run what it is must be what it was; of what an older version did not write nothing is known."""
    changed = [
        _difference(name, before[name], value)
        for name, value in json.loads(json.dumps(now)).items()
        if name in before and before[name] != value
    ]
    if changed:
        more = f"; and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise ValueError(
            f"{path.parent} was trained otherwise: {'; '.join(changed[:4])}{more}. Go on with the same settings and "
            "data, choose another output directory, or start anew in this one: --restart (Trainer.restart() in Python)."
        )


def _difference(name: str, before: Any, now: Any) -> str:
    name = brief(name, 40)
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        i = next(i for i, (a, b) in enumerate(zip(before, now, strict=True)) if a != b)
        name, before, now = f"{name}[{i}]", before[i], now[i]
    return f"{name} was {shown(before, 40)} and is {shown(now, 40)}"


def _damaged(path: Path, how: str) -> ValueError:
    return ValueError(f"{path} {how}: it is no whole checkpoint. Choose another output directory, or remove it.")


def _check_progress(progress: dict[str, Any], path: Path) -> None:
    for name, value in progress.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
            raise _damaged(path, f"says {brief(name, 40)} {shown(value)}")
    for name in COUNTS:
        if not isinstance(progress.get(name), int) or not 0 <= progress[name] < 2**53:
            raise _damaged(path, f"says {name} {shown(progress.get(name))}")
    if "best" not in progress:
        raise _damaged(path, "lacks best")
    if isinstance(progress["best"], int) and abs(progress["best"]) > 2**53:
        raise _damaged(path, f"says best {shown(progress['best'])}")


def _checked_states(
    states: Mapping[str, Mapping[str, torch.Tensor]], optimizer: torch.optim.Optimizer, path: Path
) -> dict[int, dict[str, torch.Tensor]]:
    """Adam's state by the parameter's place. The fused step writes as far as the parameter goes, whatever the
    moments' sizes: a wrong one would be written past its end."""
    parameters = {str(i): p for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    if unknown := [i for i in states if i not in parameters]:
        raise _damaged(path, f"holds the state of parameters that there are none of ({some(unknown)})")
    for i, state in states.items():
        moments = MOMENTS if "max_exp_avg_sq" in state else MOMENTS[:2]
        if set(state) != {"step", *moments}:
            raise _damaged(path, f"holds {some(sorted(state))} of parameter {i}, not step, {', '.join(moments)}")
        step, parameter = state["step"], parameters[i]
        if step.dim() or not step.dtype.is_floating_point or not (step.isfinite() and step >= 0):
            raise _damaged(path, f"says step {step.item() if step.numel() == 1 else shown(step)} of parameter {i}")
        for name in moments:
            tensor, shape = state[name], shape_of(parameter.shape)
            if tensor.shape != parameter.shape or tensor.dtype != parameter.dtype:
                raise _damaged(path, f"holds {name} of parameter {i} as {shown(tensor)}, and the parameter is {shape}")
            if not tensor.isfinite().all() or (name != "exp_avg" and (tensor < 0).any()):
                raise _damaged(path, f"holds {name} of parameter {i} with values that no run leaves")
    return {int(i): dict(state) for i, state in states.items()}
