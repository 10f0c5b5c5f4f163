"""Files that are whole or absent: safetensors and JSON, written through a temporary file."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .schema import brief, check_version, shown

FORMAT_VERSION = 1
MAX_JSON_BYTES = 16 << 20
IN_MEMORY = 256 << 20
"""Bytes; of a file up to this size tensors are read whole."""


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[str]:
    """A file beside ``path`` to write, which takes its place when the block ends well: ``path`` holds either what it
    held before or all that was written, even after a crash."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def atomic_write(path: str | Path, *parts: bytes | memoryview) -> None:
    """Write ``parts`` whole or not at all; see :func:`atomic_path`."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.writelines(parts)


def _sync_directory(directory: Path) -> None:
    """Make the renaming last; where directories can't be opened (Windows) or synced, the system sees to it."""
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically; the same tensors and metadata give the same bytes."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = memoryview(save(tensors, dict(metadata)))
    # safetensors writes the metadata in the order of a hash table, another one in every process.
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(bytes(content[8 : 8 + length]))
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    atomic_write(path, struct.pack("<Q", len(text)), text, content[8 + length :])


@contextlib.contextmanager
def _opened(path: str | Path, kind: str) -> Iterator[tuple[Any, dict[str, str]]]:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            found = metadata.get("format")
            if found != f"mendfast.{kind}":
                holds = shown(found).strip("'\"") if found else "tensors of another program"
                raise ValueError(f"{path} holds {holds}, not a mendfast {kind}.")
            check_version(metadata.get("format_version"), FORMAT_VERSION, str(path))
            yield file, metadata
    except (SafetensorError, KeyError, AttributeError, RuntimeError, OverflowError) as error:
        # The last four: dtypes that this PyTorch lacks, and shapes that it can't count.
        raise ValueError(f"{path} is no whole safetensors file ({brief(error)}); make or fetch it again.") from error


def read_tensors(path: str | Path, kind: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file whose metadata say ``format: mendfast.<kind>``.

    The tensors of a file of more than :data:`IN_MEMORY` bytes stay in it, mapped: a program that overwrites such a file
    in place, and not as :func:`atomic_write` does, ends the process that reads them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no whole safetensors file, holds something else, or a newer mendfast wrote it.
    """
    with _opened(path, kind) as (file, metadata):
        whole = Path(path).stat().st_size <= IN_MEMORY
        tensors = ((name, file.get_tensor(name)) for name in file.keys())
        return {name: tensor.clone() if whole else tensor for name, tensor in tensors}, metadata


def read_shapes(path: str | Path, kind: str) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """As :func:`read_tensors`, of the tensors their shapes alone."""
    with _opened(path, kind) as (file, metadata):
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}, metadata


def read_json_bytes(path: str | Path, most: int = MAX_JSON_BYTES) -> bytes:
    """The bytes of a settings file, of which none is large."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{path} has more than {most:,} bytes; settings of mendfast are shorter.")
    return content


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """A new directory to write into, which becomes ``path`` when the block ends well, and is gone when it doesn't.

    ``path`` must not exist, or be empty.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                os.chmod(file, 0o666 & ~_umask())  # safetensors gives its own to their owner alone
                with file.open("rb+") as handle:
                    os.fsync(handle.fileno())
        os.chmod(temporary, 0o777 & ~_umask())
        with contextlib.suppress(FileNotFoundError):
            path.rmdir()  # an empty one is in the way on Windows
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_directory(path.parent)


def json_lines(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Lines of a file that grows by whole lines of JSON, each with what it holds; one that a kill cut short is none."""
    for line in Path(path).read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            yield line, json.loads(line)


def keep_json_lines(path: str | Path, keep: Callable[[Any], bool]) -> None:
    """Rewrite such a file with the lines alone that are whole and that ``keep`` takes; those of another program raise
    in it, and go."""
    kept = []
    for line, value in json_lines(path):
        with contextlib.suppress(LookupError, TypeError, AttributeError, ValueError):
            if keep(value):
                kept.append(f"{line}\n")
    atomic_write(path, "".join(kept).encode())
