"""Edits as LoRA adapters in PEFT's format, as PEFT and vLLM load them, and back.

A directory of two files: ``adapter_model.safetensors``, with ``base_model.model.<module>.lora_A.weight`` [r, m] and
``...lora_B.weight`` [n, r], and ``adapter_config.json``. All modules have one r, and lora_alpha = r, so that the scale
is 1. Writing and reading need no ``peft``.

Formats: ``peft.LoraConfig``; vLLM's ``vllm/config/lora.py`` for the ranks.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..files import atomic_write, read_json_bytes, write_tensors
from ..layers import is_conv1d, unwrapped
from ..schema import brief, check_object, check_real, parse_json, shown, some
from .lora import Update, lora_of, new_directory, padded

log = logging.getLogger("mendfast")

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values of vLLM's --max-lora-rank."""
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_TASKS = {"causal": "CAUSAL_LM", "encoder-decoder": "SEQ_2_SEQ_LM"}
_TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<path>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
# What changes what an adapter means, and the value under which it changes nothing.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": (None, "none"), "use_dora": (None, False), "lora_bias": (None, False), "use_rslora": (None, False, True),
    "rank_pattern": (None, {}), "alpha_pattern": (None, {}), "modules_to_save": (None, []),
    "layer_replication": (None, []), "target_parameters": (None, []), "trainable_token_indices": (None, [], {}),
    "megatron_config": (None,), "alora_invocation_tokens": (None, []), "arrow_config": (None,),
}  # fmt: skip


class PeftExport(NamedTuple):
    """What :func:`export_peft` wrote."""

    path: Path
    r: int  # of every module, padding included
    rank: int  # that the edit needs, or was truncated to
    digest: str  # of the content: SHA-256, hexadecimal
    lora_name: str  # a name for servers, another one for another content
    errors: dict[str, float]  # weight -> ||exported - edit|| / ||edit||, Frobenius; 0 where nothing was truncated
    notes: list[str]  # what one should know, in sentences


def export_peft(
    edit: Update, directory: str | Path, model: nn.Module, rank: int | None = None, *, overwrite: bool = False
) -> PeftExport:
    """Write a LoRA adapter that ``PeftModel.from_pretrained(model, directory)`` and vLLM load.

    Args:
        model: the model that the edit was made for; it is not touched.
        rank: the most directions that each weight's update keeps, by singular value; None: all, which is exact.
            The adapter's r is the next of vLLM's ranks, the rest zeros.
        overwrite: replace an adapter that is there already.

    Returns:
        :class:`PeftExport`. Serve it under ``lora_name``: servers that keep the beginnings of prompts know an
        adapter by its name, so another content needs another name.

    Raises:
        FileExistsError: ``directory`` exists and is not empty.
        ValueError, TypeError: a rank below 1, an edit of another model, one that changes nothing or holds NaN.
    """
    lora = lora_of(edit, model, rank)
    bare, notes = unwrapped(model), []
    r = next((size for size in RANKS if size >= lora.rank), lora.rank)
    if r > RANKS[-1]:
        notes.append(
            f"The edit has rank {r}; vLLM takes adapters up to {RANKS[-1]}, so that only PEFT loads this one. "
            f"For vLLM pass rank={RANKS[-1]} or less."
        )
    tensors = {}
    for path, (a, b) in lora.matrices.items():
        a, b = padded(a, b, r)
        tensors[f"base_model.model.{path}.lora_A.weight"] = a
        tensors[f"base_model.model.{path}.lora_B.weight"] = b
    if any(lora.errors.values()):
        worst = max(lora.errors, key=lora.errors.__getitem__)
        notes.append(
            f"Truncated to rank {lora.rank}: the update of {worst} is {lora.errors[worst]:.2%} off, the others less."
        )
    digest = digest_of(tensors)
    config = _config(bare, lora.layers, r, digest)
    requests = json.dumps([list(request) for request in edit.requests])
    metadata = {"format": "pt", "mendfast_digest": digest, "mendfast_requests": requests}
    with new_directory(directory, overwrite=overwrite, sign=CONFIG_FILE) as inside:
        write_tensors(inside / WEIGHTS_FILE, tensors, metadata)
        atomic_write(inside / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")
    for note in notes:
        log.warning(note)
    name = f"mend-{digest[:12]}"
    return PeftExport(Path(directory), r, lora.rank, digest, name, lora.errors, notes)


def digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names, shapes and bits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _config(model: nn.Module, layers: list, r: int, digest: str) -> dict[str, Any]:
    paths = [layer.name.removesuffix(".weight") for layer in layers]
    settings = getattr(model, "config", None)
    return {
        "peft_type": "LORA",
        # Of a classifier PEFT would expect the head among the adapter's tensors.
        "task_type": _TASKS.get(_kind(model)),
        "base_model_name_or_path": getattr(settings, "_name_or_path", None) or None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": r,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(is_conv1d(layer.module) for layer in layers),
        "target_modules": _targets(model, paths),
        # PEFT's field for what it is to import; it passes over the rest, and would warn of a field of its own.
        "auto_mapping": {
            "base_model_class": type(model).__name__,
            "parent_library": type(model).__module__,
            "mendfast_digest": digest,
        },
    }


def _kind(model: nn.Module) -> str | None:
    from ..objective import model_kind

    try:
        return model_kind(model)
    except (ValueError, TypeError):
        return None  # PEFT loads adapters of any model


def _targets(model: nn.Module, paths: list[str]) -> list[str] | str:
    """Names, or where PEFT would take one for another module's ending too, a regular expression."""
    ends = tuple(f".{path}" for path in paths)
    if any(name.endswith(ends) for name, _ in model.named_modules() if name not in paths):
        return "|".join(re.escape(path) for path in sorted(paths))
    return sorted(paths)


# -- back --------------------------------------------------------------------------------------------------


def read_peft(
    directory: str | Path,
) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor, float]], list[tuple[str, str]]]:
    """Factors and requests of a LoRA adapter: one of :func:`export_peft`, or of another origin.

    Raises:
        FileNotFoundError: there is no such adapter.
        ValueError: it is no plain LoRA of matrices, or is damaged.
    """
    directory = Path(directory)
    config_file, weights_file = directory / CONFIG_FILE, directory / WEIGHTS_FILE
    if not config_file.is_file():
        raise FileNotFoundError(f"{directory} holds no {CONFIG_FILE}: no adapter was saved there.")
    if not weights_file.is_file():
        raise FileNotFoundError(
            f"{directory} holds no {WEIGHTS_FILE}. An adapter of PEFT's older format becomes one by loading and "
            "saving it with peft."
        )
    config = check_object(parse_json(read_json_bytes(config_file), str(config_file)), str(config_file))
    r, scale = _scale(config, str(config_file))
    tensors, metadata = _tensors(weights_file)
    stated = metadata.get("mendfast_digest")
    if stated is not None and stated != digest_of(tensors):
        raise ValueError(f"{weights_file} is not what was exported: its digest has changed. Export the edit again.")
    factors = {}
    for path, (a, b) in _pairs(tensors, str(weights_file)).items():
        if a.dim() != 2 or b.dim() != 2 or len(a) != r or b.shape[1] != r:
            raise ValueError(
                f"{weights_file}: {brief(path, 60)} has the matrices {shown(a)} and {shown(b)}, and {CONFIG_FILE} "
                f"states the rank {r}: they must be [{r}, inputs] and [outputs, {r}]."
            )
        keep = (a != 0).any(1) & (b != 0).any(0)
        factors[f"{path}.weight"] = (a[keep].contiguous(), b.T[keep].contiguous(), -scale)
    return factors, _requests(metadata, str(weights_file))


def _scale(config: Mapping[str, Any], where: str) -> tuple[int, float]:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{where} is of the kind {shown(config.get('peft_type'))}; only LORA adapters are edits.")
    for name, plain in _PLAIN.items():
        if config.get(name) not in plain:
            raise ValueError(
                f"{where}: {name} is {shown(config[name])}; an edit is a plain LoRA adapter, without it. Merge the "
                "adapter into the model with peft instead."
            )
    r, alpha = config.get("r"), config.get("lora_alpha", 8)
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ValueError(f"{where}: r is {shown(r)}; it must be a whole number of at least 1.")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise ValueError(f"{where}: lora_alpha is {shown(alpha)}; it must be a finite number.")
    return r, float(alpha) / (math.sqrt(r) if config.get("use_rslora") else r)


def _tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, KeyError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{path} is no whole safetensors file ({brief(error)}); make or fetch it again.") from error


def _pairs(tensors: Mapping[str, torch.Tensor], where: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise ValueError(f"{where} holds {brief(name, 60)}, which is no matrix of a plain LoRA adapter.")
        check_real(tensor, f"{where}: {brief(name, 60)}")
        sides.setdefault(match["path"], {})[match["side"]] = tensor.float()
    if not sides:
        raise ValueError(f"{where} holds no matrices.")
    if halves := [path for path, found in sides.items() if len(found) < 2]:
        raise ValueError(f"{where} lacks one of the two matrices of {some(halves)}; make or fetch it again.")
    return {path: (found["A"], found["B"]) for path, found in sides.items()}


def _requests(metadata: Mapping[str, str], where: str) -> list[tuple[str, str]]:
    found = parse_json(metadata.get("mendfast_requests", "[]"), f"The list of requests in {where}")
    valid = isinstance(found, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in found
    )
    if not valid:
        raise ValueError(f"{where}: its requests are {shown(found)}; they must be pairs [prompt, target].")
    return [tuple(pair) for pair in found]
