"""Hidden states on disk: files of many texts each, whole or absent, and only for the model that gave them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from ..files import read_shapes, write_tensors

log = logging.getLogger("mendfast")

KIND = "states"
HEADER = 160
"""Bytes that a tensor takes in a file's header, at most."""
States = list[torch.Tensor]


class KeptStates:
    """The states of texts, by key, in safetensors files under ``directory / fingerprint``; read memory-mapped.

    A file that is damaged is passed over, so that its texts are computed again. Once ``limit`` bytes are there, no
    more are written.
    """

    def __init__(self, directory: str | Path, fingerprint: str, limit: int):
        self.directory, self.limit, self.held = Path(directory) / fingerprint[:32], limit, 0
        self._places: dict[bytes, tuple[Path, int]] = {}  # the file, and how many tensors
        self._open: dict[Path, Any] = {}
        for path in sorted(self.directory.glob("*.safetensors")):
            try:
                self._note(path, list(read_shapes(path, KIND)[0]))
            except (ValueError, OSError) as error:
                log.warning("%s is passed over: %s", path, error)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def get(self, key: bytes) -> States | None:
        if (place := self._places.get(key)) is None:
            return None
        path, count = place
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt").__enter__()
            return [self._open[path].get_tensor(f"{key.hex()}.{i}").clone() for i in range(count)]
        except Exception as error:  # whatever a file that others removed or cut short makes safetensors raise
            log.warning("%s can't be read any more, and its texts are computed again: %s", path, error)
            self._places = {other: found for other, found in self._places.items() if found[0] != path}
            return None

    def put(self, states: Mapping[bytes, States]) -> None:
        """Write what is not there yet in one file; nothing if the limit does not allow it."""
        new = {key: parts for key, parts in states.items() if key not in self}
        parts = [part for own in new.values() for part in own]
        size = bytes_of(parts) + HEADER * (2 + len(parts))
        if not new or self.held + size > self.limit:
            return
        name = hashlib.blake2b(b"".join(sorted(new)), digest_size=12).hexdigest()
        path = self.directory / f"{name}.safetensors"
        tensors = {f"{key.hex()}.{i}": part for key, parts in new.items() for i, part in enumerate(parts)}
        write_tensors(path, tensors, {"format": f"mendfast.{KIND}", "format_version": "1"})
        self._note(path, list(tensors))

    def _note(self, path: Path, names: Sequence[str]) -> None:
        self.held += path.stat().st_size
        for name in names:
            key, _, i = name.partition(".")
            _, count = self._places.get(bytes.fromhex(key), (path, 0))
            self._places[bytes.fromhex(key)] = path, max(count, int(i) + 1)


def fingerprint(model: nn.Module, *more: object) -> str:
    """Of all that hidden states depend on: configuration, weights, where and by what they are computed, ``more``."""
    import transformers

    config = getattr(model.config, "to_dict", dict)()
    config = {name: value for name, value in config.items() if not name.startswith("_")}
    device = str(next(model.parameters()).device)
    said = [type(model).__name__, config, device, torch.__version__, transformers.__version__, *more]
    digest = hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}:{getattr(tensor, 'dtype', '')}:{list(getattr(tensor, 'shape', ()))}".encode())
        if isinstance(tensor, torch.Tensor) and tensor.numel():
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        elif not isinstance(tensor, torch.Tensor):
            digest.update(repr(tensor).encode())
    return digest.hexdigest()


def bytes_of(states: Sequence[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in states)
