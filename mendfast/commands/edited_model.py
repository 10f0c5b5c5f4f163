"""The directory of an edited model: what from_pretrained loads, and beside it what was edited.

``mendfast_edits.json`` says of which base model the directory is and which edits its weights hold. The edited weights
as they were before lie in ``mendfast_unedited.tensors``, safetensors by another name: servers take every
``*.safetensors`` of a directory for the model's.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..edit import Edit
from ..files import atomic_directory, atomic_write, read_json_bytes, read_tensors, write_tensors
from ..fingerprint import Fingerprint
from ..layers import named_layers
from ..pretrained import Source
from ..schema import check_object, check_version, parse_json, shown, some
from .sources import shown_bytes

FORMAT_VERSION = 1
EDITS_FILE, ORIGINALS_FILE = "mendfast_edits.json", "mendfast_unedited.tensors"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_BESIDE = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "LICENSE")


def save(
    directory: str | Path,
    model: nn.Module,
    tokenizer: Any,
    source: Source | None,
    *,
    revision: str | None = None,
    record: Mapping[str, Any] | None = None,
    originals: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write a model that ``from_pretrained`` loads, whole or not at all, in the shards of the original.

    Args:
        source: where the model came from.
        record: what :data:`EDITS_FILE` says; without one there is none.
        originals: the edited weights as they were.
    """
    options: dict[str, Any] = {}
    if source is not None and source.local and (Path(source.place) / _WEIGHTS).is_file():
        options["max_shard_size"] = _bytes(model) + 1  # one file before, one now
    shards = _shards_of(source, revision)
    try:
        with atomic_directory(directory) as place:
            model.save_pretrained(place, **options)
            if shards:
                _arrange(place, shards)
            tokenizer.save_pretrained(place)
            for name in _BESIDE:
                if source is not None and not source.gguf and (Path(source.place) / name).is_file():
                    shutil.copyfile(Path(source.place) / name, place / name)
            if record is not None:
                atomic_write(place / EDITS_FILE, json.dumps(record, indent=2, ensure_ascii=False).encode() + b"\n")
            if originals:
                metadata = {"format": "mendfast.unedited", "format_version": "1"}
                write_tensors(place / ORIGINALS_FILE, originals, metadata)
    except SafetensorError as error:
        # What the system said of a write reaches us as text.
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            number = int(found[1])
            raise OSError(number, os.strerror(number), str(directory)) from error
        raise


def check_room(directory: str | Path, model: nn.Module) -> None:
    """A ValueError where the disk has no place for the model."""
    place = Path(directory).absolute()
    while not place.exists():
        place = place.parent
    needed, free = _bytes(model), shutil.disk_usage(place).free
    if needed > free:
        raise ValueError(
            f"The model takes {shown_bytes(needed)} and the disk of {place} has {shown_bytes(free)} left; make room, "
            "or save it elsewhere."
        )


def _bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def _shards_of(source: Source | None, revision: str | None) -> dict[str, str]:
    """Tensor -> shard of the original; {} where it is one file, or nothing is known of it."""
    if source is None or source.gguf:
        return {}
    index = Path(source.place) / _INDEX
    if not source.local:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(source.place, _INDEX, revision=revision)
        index = Path(cached) if isinstance(cached, str) else index
    if not index.is_file():
        return {}
    listed = check_object(parse_json(read_json_bytes(index), str(index)), str(index)).get("weight_map")
    found = check_object(listed, f"weight_map in {index}")
    plain = all(isinstance(name, str) and Path(name).name == name for name in found.values())
    return found if plain else {}


def _arrange(place: Path, shards: Mapping[str, str]) -> None:
    """Write the tensors of the model in ``place`` anew in these shards, one at a time, if they are of the same
    names."""
    index = place / _INDEX
    if index.is_file():
        found = parse_json(read_json_bytes(index), str(index))
        where, total = found["weight_map"], found.get("metadata", {})
    else:
        with safe_open(place / _WEIGHTS, framework="pt") as file:
            where, total = dict.fromkeys(file.keys(), _WEIGHTS), {}
    if where == shards or set(where) != set(shards):
        return
    for shard in dict.fromkeys(shards.values()):
        tensors = {}
        for name in (name for name, its in shards.items() if its == shard):
            with safe_open(place / where[name], framework="pt") as file:
                tensors[name] = file.get_tensor(name)
        save_file(tensors, place / f"{shard}.new", {"format": "pt"})
    for old in set(where.values()):
        (place / old).unlink()
    for shard in set(shards.values()):
        (place / f"{shard}.new").rename(place / shard)
    content = {"metadata": total, "weight_map": dict(sorted(shards.items()))}
    index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


# -- what was edited ---------------------------------------------------------------------------------------------


def describe(path: str, edit: Edit, kind: str) -> dict[str, Any]:
    """One edit, as :data:`EDITS_FILE` lists it."""
    return {
        "file": Path(path).name,
        "kind": kind,
        "sha256": digest(edit),
        "weights": list(edit.factors),
        "requests": [list(request) for request in edit.requests],
    }


def digest(edit: Edit) -> str:
    """Of the factors: the same for the same edit, whatever its file is called."""
    from ..adapters.peft import digest_of

    tensors = {f"{name}:{part}": getattr(f, part) for name, f in edit.factors.items() for part in ("u", "delta")}
    alphas = {f"{n}:alpha": torch.tensor(f.alpha, dtype=torch.float64) for n, f in edit.factors.items()}
    return digest_of({**tensors, **alphas})


def make_record(
    base: Mapping[str, Any], fingerprint: Fingerprint | None, edits: list[dict[str, Any]], dtype: str
) -> dict[str, Any]:
    """The content of :data:`EDITS_FILE`."""
    from .. import __version__

    return {
        "format": "mendfast.edited_model",
        "format_version": FORMAT_VERSION,
        "mendfast": __version__,
        "base": {**base, "fingerprint": json.loads(fingerprint.to_json()) if fingerprint is not None else None},
        "dtype": dtype,
        "edits": edits,
    }


def read_record(directory: str | Path) -> dict[str, Any] | None:
    """What :data:`EDITS_FILE` of a model says; None where it has none.

    Raises:
        ValueError: there is one, and it says what can't be.
    """
    path = Path(directory) / EDITS_FILE
    if not path.is_file():
        return None
    record = check_object(parse_json(read_json_bytes(path), str(path)), str(path))
    if record.get("format") != "mendfast.edited_model":
        raise ValueError(f"{path} says the format {shown(record.get('format'))}; it must be mendfast.edited_model.")
    check_version(record.get("format_version"), FORMAT_VERSION, str(path))
    check_object(record.get("base"), f"base in {path}")
    edits = record.get("edits")
    for edit in edits if isinstance(edits, list) else [edits]:
        texts = (edit.get(name) for name in ("file", "kind", "sha256")) if isinstance(edit, dict) else [None]
        lists = (edit.get(name) for name in ("weights", "requests")) if isinstance(edit, dict) else [None]
        whole = all(isinstance(text, str) for text in texts) and all(isinstance(part, list) for part in lists)
        if not whole or not all(isinstance(name, str) for name in edit["weights"]) or not _pairs(edit["requests"]):
            raise ValueError(f"{path} lists the edit {shown(edit)}, which is none; apply the edits anew.")
    return record


def base_of(record: Mapping[str, Any] | None, where: str) -> Fingerprint | None:
    """The fingerprint of the model that was edited, from what :func:`read_record` gives."""
    found = record["base"].get("fingerprint") if record is not None else None
    return Fingerprint.from_json(json.dumps(found), f"{where}/{EDITS_FILE}") if found is not None else None


def _pairs(requests: list) -> bool:
    return all(isinstance(r, list) and len(r) == 2 and all(isinstance(text, str) for text in r) for r in requests)


def read_originals(directory: str | Path) -> dict[str, torch.Tensor]:
    """The weights of an edited model as they were; {} where they were not kept."""
    path = Path(directory) / ORIGINALS_FILE
    if not path.is_file():
        return {}
    # copies: what safetensors gives is the file itself, mapped
    return {name: tensor.clone() for name, tensor in read_tensors(path, "unedited")[0].items()}


@torch.no_grad()
def put_back(model: nn.Module, originals: Mapping[str, torch.Tensor], where: str) -> None:
    """Give the edited weights of ``model`` their bits from before; all are checked before any is written.

    Raises:
        ValueError: a weight that the model lacks, or holds in another shape or dtype.
    """
    layers = named_layers(model, list(originals))
    for layer, original in zip(layers, originals.values(), strict=True):
        weight = layer.weight
        if weight.shape != original.shape or weight.dtype != original.dtype:
            raise ValueError(
                f"{where} keeps {layer.name} as {shown(original)}, and the model holds it as {shown(weight.data)}: "
                "load it in the dtype that it was saved in (--dtype auto)."
            )
    for layer, original in zip(layers, originals.values(), strict=True):
        layer.weight.copy_(original)


def check_complete(record: Mapping[str, Any], originals: Mapping[str, torch.Tensor], where: str) -> None:
    """A ValueError where an edited weight's original is not there."""
    edited = {name: None for edit in record["edits"] for name in edit["weights"]}
    if missing := [name for name in edited if name not in originals]:
        base = shown(record["base"].get("model"))
        raise ValueError(
            f"{where} does not keep {some(missing)} as {'it was' if len(missing) == 1 else 'they were'}, so that the "
            f"edits can't be taken out of it; load its base model, {base}, again."
        )
