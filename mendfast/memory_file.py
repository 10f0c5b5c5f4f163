"""The file that an EditMemory is kept in, and the journal beside it while many edits are added.

The file is safetensors, written whole or not at all: for each weight the rows of all records one below the other
("NAME:u" [T, m], "NAME:d" [T, n], float32) and how many of them each record has ("NAME:rows"); in the metadata the
requests, whose records they are, and a checksum of it all, by which a journal names the file that it continues.

The journal, FILE.journal, is a row of frames: length, SHA-256, content. The first says which file it continues, each
other holds some records, laid out as in the file. A frame that a crash has cut off is left out, and a journal that
continues another file is of no use any more: the file was written whole since.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from .edit import EditRequest, _checked_requests
from .files import _sync_directory, atomic_write, read_shapes, read_tensors, write_tensors
from .schema import brief, check_object, check_real, check_version, differences, parse_json, shown, some
from .updates import checksum

log = logging.getLogger("mendfast")

FORMAT_VERSION = 1
KEY_DIGITS = 12
_FRAME = struct.Struct("<Q32s")


class Record(NamedTuple):
    """One edit as a memory keeps it."""

    request: EditRequest
    rows: Mapping[str, tuple[torch.Tensor, torch.Tensor]]  # weight -> (u [T, m], d [T, n]), float32, on the CPU


class Identity(NamedTuple):
    """Whose records they are; those of different owners don't mix."""

    model_type: str
    editor: str  # a digest of what the rows depend on
    aggregation: str
    weights: Mapping[str, tuple[int, int]]  # weight -> (m, n)
    base_model: str = ""  # a fingerprint of the weights that are edited, where there is one


def key_of(prompt: str) -> str:
    """The name of a prompt's record: the beginning of its SHA-256, in hexadecimal digits."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:KEY_DIGITS]


def check_same(mine: Identity, other: Identity, where: str) -> None:
    """A ValueError that says why records of ``other``, found in ``where``, are of no use to ``mine``."""
    if mine.model_type != other.model_type:
        raise ValueError(f"{where} was made for a {shown(other.model_type)} model; this one is a {mine.model_type}.")
    if wrong := differences(other.weights, mine.weights):
        raise ValueError(f"{where} was made for another model: {'; '.join(wrong[:3])}.")
    if mine.base_model and other.base_model and mine.base_model != other.base_model:
        raise ValueError(f"{where} was made for a {mine.model_type} model with other weights.")
    if (mine.editor, mine.aggregation) != (other.editor, other.aggregation):
        raise ValueError(
            f"{where} holds the records of another editor, or of this one before it was trained on. Take that "
            "editor, or make them anew: EditMemory(editor).add(requests)."
        )


# -- records as tensors ------------------------------------------------------------------------------------------


def pack(records: Sequence[Record], identity: Identity) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata."""
    tensors = {}
    for name, widths in identity.weights.items():
        sides = zip(*(record.rows[name] for record in records), strict=True) if records else ([], [])
        for part, side, width in zip("ud", sides, widths, strict=True):
            tensors[f"{name}:{part}"] = torch.cat([torch.zeros(0, width), *side])
        tensors[f"{name}:rows"] = torch.tensor([len(record.rows[name][0]) for record in records], dtype=torch.int64)
    metadata = {
        "format": "mendfast.memory",
        "format_version": str(FORMAT_VERSION),
        "requests": json.dumps([list(record.request) for record in records]),
        "weights": json.dumps(identity.weights),
        **{field: getattr(identity, field) for field in ("model_type", "editor", "aggregation", "base_model")},
    }
    return tensors, {**metadata, "checksum": _checksum(tensors, metadata)}


def unpack(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], where: str
) -> tuple[list[Record], Identity]:
    """The inverse of :func:`pack`, whatever it is given.

    Raises:
        ValueError: says what is wrong with it.
    """
    identity, requests = _head(metadata, where)
    expected = {f"{name}:{part}" for name in identity.weights for part in ("u", "d", "rows")}
    if missing := sorted(expected - set(tensors)):
        raise ValueError(f"{where} says that it is a mendfast memory but lacks {some(missing)}; save it again.")
    if extra := sorted(set(tensors) - expected):
        raise ValueError(f"{where} holds {some(extra)}, of weights that it does not name; save it again.")
    if metadata.get("checksum") != _checksum(tensors, metadata):
        raise ValueError(f"{where} is damaged: what it holds does not have its checksum. Make or fetch it again.")
    rows: list[dict[str, tuple[torch.Tensor, torch.Tensor]]] = [{} for _ in requests]
    for name, widths in identity.weights.items():
        counts, sides = tensors[f"{name}:rows"], []
        if counts.dtype != torch.int64 or counts.shape != (len(requests),) or (counts < 0).any():
            raise ValueError(f"{where}: the numbers of rows of {brief(name, 60)} are not one for each request.")
        for part, width in zip("ud", widths, strict=True):
            side, what = tensors[f"{name}:{part}"], f"{where}: {part} of {brief(name, 60)}"
            check_real(side, what)
            total = sum(counts.tolist())
            if side.shape != (total, width):
                raise ValueError(f"{what} is {shown(side)}; it must be [{total:,}, {width:,}].")
            sides.append(check_real(side.float(), f"{what}, in float32").split(counts.tolist()))
        for mine, pair in zip(rows, zip(*sides, strict=True), strict=True):
            mine[name] = pair
    return [Record(EditRequest(*request), part) for request, part in zip(requests, rows, strict=True)], identity


def _head(metadata: Mapping[str, str], where: str) -> tuple[Identity, list[list[str]]]:
    lacking = [name for name in ("requests", "weights", "model_type", "editor", "aggregation") if name not in metadata]
    if lacking:
        raise ValueError(f"{where} says that it is a mendfast memory but lacks {some(lacking)}; save it again.")
    weights = check_object(parse_json(metadata["weights"], f"The list of weights in {where}"), f"weights in {where}")
    for name, shape in weights.items():
        if not isinstance(shape, list) or [type(size) for size in shape] != [int, int] or min(shape) < 1:
            raise ValueError(f"{where} gives {shown(name)} the shape {shown(shape)}; it must be [m, n].")
    requests = _checked_requests(parse_json(metadata["requests"], f"The list of requests in {where}"), where)
    if len({prompt for prompt, _ in requests}) < len(requests):
        raise ValueError(f"{where} holds a prompt twice; save it again.")
    fields = [metadata[name] for name in ("model_type", "editor", "aggregation")]
    shapes = {name: tuple(shape) for name, shape in weights.items()}
    return Identity(*fields, shapes, metadata.get("base_model", "")), requests


def _checksum(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    parts = [[name, str(t.dtype), list(t.shape), int(checksum(t))] for name, t in sorted(tensors.items())]
    said = sorted((name, text) for name, text in metadata.items() if name != "checksum")
    return hashlib.sha256(json.dumps([parts, said]).encode()).hexdigest()


# -- the file ----------------------------------------------------------------------------------------------------


def journal_of(path: str | Path) -> Path:
    path = Path(path)
    return path.with_name(f"{path.name}.journal")


def write(path: str | Path, records: Sequence[Record], identity: Identity) -> str:
    """Write the file; a journal beside it is done with. Returns the file's checksum."""
    tensors, metadata = pack(records, identity)
    write_tensors(path, tensors, metadata)
    journal_of(path).unlink(missing_ok=True)
    return metadata["checksum"]


def read(path: str | Path) -> tuple[list[Record], Identity | None, str, bool]:
    """Records, those of a journal that continues the file included, whose they are, the file's checksum, and whether
    there was such a journal.

    Raises:
        FileNotFoundError: there is neither file nor journal.
        ValueError: it is no memory, or a damaged one.
    """
    path = Path(path)
    if path.is_file() or not journal_of(path).is_file():
        tensors, metadata = read_tensors(path, "memory")
        records, identity = unpack(tensors, metadata, str(path))
        found = metadata["checksum"]
    else:
        records, identity, found = [], None, ""
    added = [*read_journal(path, found)]
    by_key = {key_of(record.request.prompt): record for record in records}
    for record, other in added:
        if identity is None:
            identity = other
        check_same(identity, other, f"The journal of {path}")
        by_key[key_of(record.request.prompt)] = record
    return [*by_key.values()], identity, found, bool(added)


def checksum_of(path: str | Path) -> str:
    """The checksum that the file names; "" where there is no file."""
    return read_shapes(path, "memory")[1].get("checksum", "") if Path(path).is_file() else ""


def read_requests(path: str | Path) -> dict[str, EditRequest]:
    """Key -> request of a memory's file, in the order of adding; needs no editor and no model."""
    if Path(path).is_file():
        _, metadata = read_shapes(path, "memory")
        requests = [EditRequest(*request) for request in _head(metadata, str(path))[1]]
        added = read_journal(path, metadata.get("checksum", ""))
        requests += [record.request for record, _ in added]
    else:
        requests = [record.request for record in read(path)[0]]
    return {key_of(request.prompt): request for request in requests}


# -- the journal -------------------------------------------------------------------------------------------------


class Journal:
    """Records that are made, before the file is written whole; each call is on the disk when it returns."""

    def __init__(self, path: str | Path, base: str, records: Sequence[Record], identity: Identity):
        self.path, self._identity = journal_of(path), identity
        head = {"format": "mendfast.memory.journal", "format_version": FORMAT_VERSION, "base": base}
        first = [_frame(json.dumps(head).encode())]
        atomic_write(self.path, *first, *([_frame(self._content(records))] if records else []))
        self._file = self.path.open("ab")

    def _content(self, records: Sequence[Record]) -> bytes:
        return save(*pack(records, self._identity))

    def write(self, records: Sequence[Record]) -> None:
        self._file.write(_frame(self._content(records)))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def discard(self) -> None:
        self.close()
        self.path.unlink(missing_ok=True)
        _sync_directory(self.path.parent)


def _frame(content: bytes) -> bytes:
    return _FRAME.pack(len(content), hashlib.sha256(content).digest()) + content


def read_journal(path: str | Path, base: str) -> Iterator[tuple[Record, Identity]]:
    """The records of the journal beside ``path``, if it continues the file of the checksum ``base``."""
    journal = journal_of(path)
    if not journal.is_file():
        return
    frames = _frames(journal)
    head = check_object(parse_json(next(frames, b"{}"), f"The head of {journal}"), f"The head of {journal}")
    check_version(head.get("format_version"), FORMAT_VERSION, str(journal))
    if head.get("base") != base:
        if head:
            log.warning("%s continues another file than %s, and is left out", journal, path)
        return
    for number, content in enumerate(frames, 1):
        where = f"{journal}, frame {number},"
        records, identity = unpack(*_contents(content, where), where)
        yield from ((record, identity) for record in records)


def _frames(journal: Path) -> Iterator[bytes]:
    left = journal.stat().st_size
    with journal.open("rb") as file:
        while left:
            start = file.read(_FRAME.size)
            length, digest = _FRAME.unpack(start) if len(start) == _FRAME.size else (left, b"")
            left -= _FRAME.size + length
            content = file.read(length) if left >= 0 else b""
            if hashlib.sha256(content).digest() != digest:
                log.warning("The end of %s was cut off, and is left out", journal)
                return
            yield content


def _contents(content: bytes, where: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise ValueError(f"{where} is no whole safetensors content ({brief(error)}).") from error
    (length,) = struct.unpack_from("<Q", content)
    return tensors, parse_json(content[8 : 8 + length], where).get("__metadata__", {})
