"""What is in a file or directory that mendfast writes or reads, as figures; no model is needed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .. import memory_file
from ..adapters import peft as adapters
from ..config import MendConfig
from ..edit import Edit
from ..editor import CONFIG_FILE, METRIC_FILE, WEIGHTS_FILE
from ..files import read_json_bytes, read_shapes
from ..fingerprint import Fingerprint
from ..metric import Metric
from ..schema import brief, check_object, parse_json, shown
from ..training.loop import CHECKPOINT
from . import edited_model

KINDS = "no edit, memory, editor, metric, checkpoint, MEND archive, adapter or model"
_DIGITS = 12  # of a fingerprint's digest


def holdings(path: str | Path) -> dict[str, Any]:
    """What ``path`` holds.

    Returns:
        "path", "kind", "format_version", "bytes"; "base": "name", "model_type" and "fingerprint" (digits that are the
        same for the same base model) where known; "weights": name -> "inputs", "outputs", "rows"; "requests", pairs,
        or None where the kind has none; "details", of this kind alone.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError, ImportError: it is damaged, of no known kind, or read by a package that is not installed.
    """
    path = Path(path)
    read = _reader(path)
    try:
        found = read(path)
    except (ValueError, OSError, ImportError, MemoryError, SafetensorError):
        raise
    # Files of unknown origin, some read by other libraries: whatever is raised says that they are damaged.
    except Exception as error:
        why = brief(f"{type(error).__name__}: {error}", 160)
        raise ValueError(f"{path} is damaged ({why}); make or fetch it again.") from error
    size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) if path.is_dir() else path.stat().st_size
    return {"path": str(path), **found, "bytes": size}


def _reader(path: Path) -> Callable[[Path], dict[str, Any]]:
    if path.is_dir():
        for sign, read in _DIRECTORIES.items():
            if (path / sign).is_file():
                return read
        runs = [name for name in ("best", "last") if (path / name).is_dir()]
        hint = f" Inspect {' or '.join(str(path / name) for name in runs)}." if runs else ""
        raise ValueError(f"{path} holds nothing that mendfast knows: {KINDS}.{hint}")
    if path.name.endswith(".journal"):
        return _journal
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    with path.open("rb") as file:
        start = file.read(10)
    if start[:4] == b"GGUF":
        return _gguf
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return _archive
    if path.name in _SETTINGS:
        return _settings
    if len(start) == 10 and start[8:9] == b"{" and path.suffix != ".json":
        return _safetensors
    raise ValueError(f"{path} is nothing that mendfast knows: {KINDS}.")


def _holding(
    kind: str,
    *,
    version: Any = None,
    base: Mapping[str, Any] | None = None,
    weights: Mapping[str, Mapping[str, int]] | None = None,
    requests: Any = None,
    **details: Any,
) -> dict[str, Any]:
    return {
        "kind": kind,
        "format_version": version if version is None else int(version),
        "base": {"name": None, "model_type": None, "fingerprint": None, **(base or {})},
        "weights": {name: dict(known) for name, known in (weights or {}).items()},
        "requests": None if requests is None else [list(request) for request in requests],
        "details": {name: value for name, value in details.items() if value not in (None, "", [])},
    }


def _base(fingerprint: Fingerprint | None, model_type: str | None = None) -> dict[str, Any]:
    if fingerprint is None:
        return {"model_type": model_type or None}
    samples = Fingerprint(fingerprint.samples)  # whatever the folder was called
    digits = hashlib.sha256(samples.to_json().encode()).hexdigest()[:_DIGITS]
    return {"name": fingerprint.name, "model_type": fingerprint.model_type or model_type, "fingerprint": digits}


# -- safetensors -------------------------------------------------------------------------------------------------


def _safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata, names = file.metadata() or {}, list(file.keys())
    except (SafetensorError, KeyError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{path} is no whole safetensors file ({brief(error)}); make or fetch it again.") from error
    read = _FILES.get(metadata.get("format", "").removeprefix("mendfast."))
    if read is not None and metadata["format"].startswith("mendfast."):
        return read(path)
    if any(".lora_A." in name for name in names):
        if (path.parent / adapters.CONFIG_FILE).is_file():
            return _adapter(path.parent)
        raise ValueError(
            f"{path} holds an adapter's matrices without {adapters.CONFIG_FILE} beside it; both are needed."
        )
    raise ValueError(f"{path} holds {len(names):,} tensors of another program: {KINDS}.")


def _edit(path: Path) -> dict[str, Any]:
    edit = Edit.load(path)
    weights = {name: {"inputs": u.shape[1], "outputs": d.shape[1], "rows": len(u)} for name, (u, d, _) in
               edit.factors.items()}  # fmt: skip
    base = _base(edit.fingerprint, edit.model_type)
    return _holding("an edit", version=_version(path), base=base, weights=weights, requests=edit.requests)


def _memory(path: Path) -> dict[str, Any]:
    records, identity, _, more = memory_file.read(path)
    base = {"model_type": identity.model_type} if identity else {}
    weights = {}
    for name, (m, n) in (identity.weights if identity else {}).items():
        rows = sum(len(record.rows[name][0]) for record in records)
        weights[name] = {"inputs": m, "outputs": n, "rows": min(rows, m, n)}
    return _holding(
        "a memory", version=_version(path) if path.is_file() else 1, base=base, weights=weights,
        requests=[record.request for record in records],
        keys=[memory_file.key_of(record.request.prompt) for record in records],
        aggregation=identity.aggregation if identity else None,
        editor=identity.editor[:_DIGITS] if identity else None,
        journal="edits that are not in the file yet" if more else None,
    )  # fmt: skip


def _journal(path: Path) -> dict[str, Any]:
    whole = path.with_name(path.name.removesuffix(".journal"))
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    return {**_memory(whole), "kind": "a memory, with its journal"}


def _metric(path: Path) -> dict[str, Any]:
    metric = Metric.load(path)
    weights = {name: {"inputs": moment.m} for name, moment in metric.moments.items()}
    ranks = {moment.rank for moment in metric.moments.values()}
    rank = "all" if ranks == {None} else max(rank or 0 for rank in ranks)
    return _holding(
        "a metric: what must stay", version=_version(path), base={"model_type": metric.model_type}, weights=weights,
        tokens=metric.tokens, directions_kept=rank,
    )  # fmt: skip


def _checkpoint(path: Path) -> dict[str, Any]:
    shapes, metadata = read_shapes(path, "checkpoint")
    progress = check_object(parse_json(metadata.get("progress", ""), f"The progress in {path}"), "The progress")
    config = check_object(parse_json(metadata.get("config", ""), f"The configuration in {path}"), "The configuration")
    own = {name: shape for name, shape in shapes.items() if name.startswith("own:")}
    return _holding(
        "a checkpoint of training", version=metadata.get("format_version"), learner=metadata.get("learner"),
        parameters=_count(own), progress=progress, settings=config,
    )  # fmt: skip


def _system(path: Path) -> dict[str, Any]:
    shapes, metadata = read_shapes(path, "system")
    return _holding(
        "a trained system of mendfast eval", version=metadata.get("format_version"),
        base={"model_type": metadata.get("model_type")}, system=metadata.get("system"), parameters=_count(shapes),
    )  # fmt: skip


def _editor_weights(path: Path) -> dict[str, Any]:
    shapes, metadata = read_shapes(path, "editor")
    base = _base(Fingerprint.from_json(metadata.get("fingerprint"), str(path)), metadata.get("model_type"))
    return _holding("an editor's numbers", version=metadata.get("format_version"), base=base, parameters=_count(shapes))


def _originals(path: Path) -> dict[str, Any]:
    shapes, metadata = read_shapes(path, "unedited")
    weights = {name: dict(zip(("inputs", "outputs"), shape, strict=False)) for name, shape in shapes.items()}
    return _holding(
        "an edited model's weights as they were", version=metadata.get("format_version"), weights=weights
    )  # fmt: skip


def _version(path: Path) -> Any:
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get("format_version")


def _count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())


# -- directories -------------------------------------------------------------------------------------------------


def _editor(path: Path) -> dict[str, Any]:
    config = MendConfig.load(path / CONFIG_FILE)
    if not (path / WEIGHTS_FILE).is_file():
        raise FileNotFoundError(f"{path} holds {CONFIG_FILE} and no {WEIGHTS_FILE}: it is no whole editor.")
    found = _editor_weights(path / WEIGHTS_FILE)
    metric = Metric.load(path / METRIC_FILE) if (path / METRIC_FILE).is_file() else None
    details = {
        **found["details"], "aggregation": config.aggregation, "rank": config.rank, "blocks": config.blocks,
        "sides": config.sides, "chat": config.chat, "prompt_template": config.prompt_template,
    }  # fmt: skip
    if metric is not None:
        details["protected_tokens"] = metric.tokens
    if (path / CHECKPOINT).is_file():
        details["progress"] = _checkpoint(path / CHECKPOINT)["details"].get("progress")
    weights: dict[str, dict[str, int]] = {name: {} for name in config.layers or []}
    return {**found, "kind": "an editor", "weights": weights, "details": details}


def _adapter(path: Path) -> dict[str, Any]:
    factors, requests = adapters.read_peft(path)
    config_file = path / adapters.CONFIG_FILE
    config = check_object(parse_json(read_json_bytes(config_file), str(config_file)), str(config_file))
    weights = {name: {"inputs": a.shape[1], "outputs": b.shape[1], "rows": len(a)} for name, (a, b, _) in
               factors.items()}  # fmt: skip
    mapping = config.get("auto_mapping")
    digest = mapping.get("mendfast_digest") if isinstance(mapping, dict) else None
    name = config.get("base_model_name_or_path")
    return _holding(
        "a PEFT adapter", base={"name": brief(name, 80) if isinstance(name, str) else None}, weights=weights,
        requests=requests, r=config.get("r"), lora_alpha=config.get("lora_alpha"),
        task_type=shown(config["task_type"]).strip("'") if config.get("task_type") else None,
        digest=digest[:_DIGITS] if isinstance(digest, str) else None,
    )  # fmt: skip


def _model(path: Path) -> dict[str, Any]:
    config_file = path / "config.json"
    config = check_object(parse_json(read_json_bytes(config_file), str(config_file)), str(config_file))
    kind = config.get("model_type")
    base = {"name": path.resolve().name, "model_type": brief(kind, 60) if isinstance(kind, str) else None}
    record = edited_model.read_record(path)
    if record is None:
        return _holding("a model, with no record of edits", base=base)
    base = {**base, **_base(edited_model.base_of(record, str(path)), base["model_type"])}
    if isinstance(record["base"].get("model"), str):
        base["name"] = brief(record["base"]["model"], 80)
    names = dict.fromkeys(name for edit in record["edits"] for name in edit["weights"])
    return _holding(
        "an edited model", version=record.get("format_version"), base=base, weights={name: {} for name in names},
        requests=[request for edit in record["edits"] for request in edit["requests"]],
        edits=[edit["file"] for edit in record["edits"]],
        can_be_taken_back=(path / edited_model.ORIGINALS_FILE).is_file(),
    )  # fmt: skip


def _settings(path: Path) -> dict[str, Any]:
    """A directory by one of its files."""
    return _reader(path.parent)(path.parent)


# -- other programs' ---------------------------------------------------------------------------------------------


def _archive(path: Path) -> dict[str, Any]:
    from ..compat.mend_archive import describe_mend_archive

    found = describe_mend_archive(path)
    return _holding(
        "an archive of the released MEND code", base={"model_type": found.pop("model_type")}, **found
    )  # fmt: skip


def _gguf(path: Path) -> dict[str, Any]:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError(f"{path} is read by the package gguf: pip install 'mendfast[gguf]'.") from error
    try:
        return _read_gguf(path, GGUFReader(str(path)))
    # Of a damaged file the package raises nearly anything.
    except Exception as error:
        why = brief(f"{type(error).__name__}: {error}", 160)
        raise ValueError(f"{path} is no whole GGUF file ({why}); make or fetch it again.") from error


def _read_gguf(path: Path, reader: Any) -> dict[str, Any]:
    def said(name: str) -> Any:
        found = reader.get_field(name)
        return found.contents() if found is not None else None

    base = {"name": said("general.name"), "model_type": said("general.architecture")}
    if said("general.type") != "adapter":
        return _holding("a GGUF model", base=base, tensors=len(reader.tensors))
    first = {t.name.removesuffix(".lora_a"): t for t in reader.tensors if t.name.endswith(".lora_a")}
    second = {t.name.removesuffix(".lora_b"): t for t in reader.tensors if t.name.endswith(".lora_b")}
    if lacking := sorted(set(first) ^ set(second)):
        raise ValueError(f"it lacks one of the two matrices of {brief(lacking[0], 60)}")
    weights = {  # GGUF counts dimensions from the last
        name: {"inputs": int(a.shape[0]), "outputs": int(second[name].shape[1]), "rows": int(a.shape[1])}
        for name, a in first.items()
    }
    base["name"] = None  # it is the adapter's
    return _holding("a GGUF adapter", base=base, weights=weights, lora_alpha=said("adapter.lora.alpha"))


_FILES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "edit": _edit, "memory": _memory, "metric": _metric, "checkpoint": _checkpoint, "system": _system,
    "editor": _editor_weights, "unedited": _originals,
}  # fmt: skip
_DIRECTORIES: dict[str, Callable[[Path], dict[str, Any]]] = {
    CONFIG_FILE: _editor, adapters.CONFIG_FILE: _adapter, "config.json": _model,
    CHECKPOINT: lambda path: _checkpoint(path / CHECKPOINT),
}  # fmt: skip
_SETTINGS = (CONFIG_FILE, adapters.CONFIG_FILE, edited_model.EDITS_FILE)
