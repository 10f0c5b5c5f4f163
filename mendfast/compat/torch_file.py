"""Files of ``torch.save``, read without importing, calling or running anything that they name.

Both layouts are known: the zip archive (torch >= 1.6) and the older run of pickles. Of the globals that a pickle
names, only the containers and tensors listed here mean something; every other one becomes an :class:`Inert` that
keeps its name and what it was given. Tensors stay in the file until they are asked for; that the file holds them, in
the sizes that it announces, is known once it is open.

Source of the layouts: ``torch/serialization.py`` and ``torch/_utils.py`` of PyTorch 1.4 and 2.x.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..schema import brief, shown
from .pickle_reader import BrokenPickle, Inert, Known, PickleReader

__all__ = ["Inert", "Storage", "StoredTensor", "TorchFile"]

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
MAX_DIMENSIONS = 16
MAX_EXTENT = 1 << 48
_DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


class Storage(NamedTuple):
    """Numbers in the file."""

    key: str
    dtype: torch.dtype
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class StoredTensor(NamedTuple):
    """A tensor in the file; :meth:`TorchFile.tensor` reads it."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_EXTENT


def _stored_tensor(storage: Any = None, offset: Any = None, size: Any = None, stride: Any = None, *_: Any) -> Any:
    readable = isinstance(storage, Storage) and _whole(offset)
    for numbers in (size, stride):
        readable = readable and isinstance(numbers, (tuple, list)) and len(numbers) <= MAX_DIMENSIONS
        readable = readable and all(map(_whole, numbers))
    if not readable or len(size) != len(stride):
        raise BrokenPickle("a tensor whose storage or shape can't be read")
    last = offset + sum((extent - 1) * step for extent, step in zip(size, stride, strict=True))
    numel = math.prod(size)
    if numel > storage.numel or (numel and last >= storage.numel):
        raise BrokenPickle(f"a tensor of shape {brief(tuple(size), 60)} in a storage of {storage.numel} numbers")
    return StoredTensor(storage, offset, tuple(size), tuple(stride))


def _dict(pairs: Any = (), *_: Any) -> dict[Any, Any]:
    """An OrderedDict. Python 2 writes one with a list of its items."""
    made = {}
    for pair in pairs if isinstance(pairs, (list, tuple)) else [None]:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not isinstance(pair[0], (str, int)):
            raise BrokenPickle("an OrderedDict whose items can't be read")
        made[pair[0]] = pair[1]
    return made


_KNOWN = {
    ("collections", "OrderedDict"): Known(_dict),
    ("torch._utils", "_rebuild_tensor_v2"): Known(_stored_tensor),
    ("torch._utils", "_rebuild_tensor"): Known(_stored_tensor),
    ("torch._utils", "_rebuild_parameter"): Known(lambda data=None, *_: data),
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
    **{("torch.cuda", name): dtype for name, dtype in _DTYPES.items()},
}


class TorchFile:
    """A file of ``torch.save``, open for reading: use it in a ``with`` block.

    ``content`` is what was saved, with :class:`StoredTensor` for tensors and :class:`Inert` for whatever is
    neither tensor, container, text nor number.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no whole file of torch.save.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"There is no file {self.path}.")
        self._zip: zipfile.ZipFile | None = None
        self._storages: dict[str, Storage] = {}
        self._places: dict[str, tuple[int, int]] = {}  # key -> offset, number of elements; the older layout
        self._file = open(self.path, "rb")  # noqa: SIM115
        self._length = self.path.stat().st_size
        try:
            self.content = self._read_zip() if zipfile.is_zipfile(self._file) else self._read_pickles()
        except Exception as error:  # a broken file raises nearly anything
            self.close()
            raise ValueError(
                f"{self.path} is no whole file of torch.save ({brief(error) or type(error).__name__}); "
                "it was cut short or another program wrote it. Fetch it again."
            ) from error

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._zip is not None:
            self._zip.close()
        self._file.close()

    def tensor(self, stored: StoredTensor) -> torch.Tensor:
        """The tensor, on the CPU, in the dtype that it was saved in.

        Raises:
            ValueError: its numbers are damaged.
        """
        storage = stored.storage
        try:
            content = self._member(f"data/{storage.key}") if self._zip else self._stretch(storage)
            if len(content) != storage.nbytes:
                raise EOFError(f"storage {shown(storage.key)} ends early")
        except (OSError, EOFError, RuntimeError, ValueError, struct.error, zipfile.BadZipFile) as error:
            raise ValueError(f"{self.path} is damaged: {brief(error)}. Fetch it again.") from error
        dtype = storage.dtype
        flat = torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return flat.as_strided(stored.size, stored.stride, stored.offset).clone()

    def _pickles(self, file: Any, size: int) -> PickleReader:
        return PickleReader(file, size, _KNOWN, self._persistent)

    def _persistent(self, saved: Any) -> Any:
        if not isinstance(saved, tuple) or len(saved) < 5 or saved[0] != "storage":
            return Inert("persistent id", (saved,))
        _, dtype, key, _, numel, *view = saved
        readable = isinstance(dtype, torch.dtype) and isinstance(key, (str, int)) and _whole(numel)
        if not readable or any(part is not None for part in view):
            return Inert("persistent id", saved)
        storage = Storage(str(key), dtype, numel)
        if self._storages.setdefault(storage.key, storage) != storage:
            raise BrokenPickle(f"storage {shown(storage.key)} in two sizes or dtypes")
        if storage.nbytes > self._length:
            raise BrokenPickle(f"storage {shown(storage.key)} of {storage.nbytes:,} bytes, more than the file has")
        return storage

    # -- zip, torch >= 1.6 ---------------------------------------------------------------------------------

    def _read_zip(self) -> Any:
        self._zip = zipfile.ZipFile(self._file)
        roots = [name[: -len("data.pkl")] for name in self._zip.namelist() if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise ValueError("a zip without torch's data.pkl")
        self._root = roots[0]
        if f"{self._root}byteorder" in self._zip.NameToInfo and self._member("byteorder") != b"little":
            raise ValueError("saved on a big-endian machine")
        pickled = self._member("data.pkl")
        content = self._pickles(io.BytesIO(pickled), len(pickled)).load()
        if sum(storage.nbytes for storage in self._storages.values()) > self._length:
            raise ValueError("storages that are larger, all together, than the file")
        for key, storage in self._storages.items():
            if (size := self._info(f"data/{key}").file_size) != storage.nbytes:
                raise ValueError(f"storage {shown(key)} of {size:,} bytes where {storage.nbytes:,} were announced")
        return content

    def _info(self, name: str) -> zipfile.ZipInfo:
        info = self._zip.NameToInfo.get(self._root + name)
        if info is None:
            raise zipfile.BadZipFile(f"there is no {shown(name)} in it")
        # torch never compresses: a small file may not grow huge, nor a size be announced that it doesn't have.
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise zipfile.BadZipFile(f"{shown(name)} is compressed")
        if info.file_size > self._length:
            raise zipfile.BadZipFile(f"{shown(name)} goes past the end of the file")
        return info

    def _member(self, name: str) -> bytes:
        with self._zip.open(self._info(name)) as file:
            return file.read()

    # -- pickles one after another, torch < 1.6 ------------------------------------------------------------

    def _read_pickles(self) -> Any:
        file = self._file
        file.seek(0)
        pickles = self._pickles(file, self._length)
        if pickles.load() != LEGACY_MAGIC or pickles.load() != LEGACY_PROTOCOL:
            raise ValueError("neither torch's zip nor its older layout")
        if not pickles.load().get("little_endian", True):
            raise ValueError("saved on a big-endian machine")
        content = pickles.load()
        for key in pickles.load():
            (numel,) = struct.unpack("<q", file.read(8))
            storage, offset = self._storages[str(key)], file.tell()
            if numel != storage.numel:
                raise ValueError(f"storage {shown(key)} of {numel:,} numbers where {storage.numel:,} were announced")
            if storage.nbytes > self._length - offset:
                raise ValueError(f"storage {shown(key)} goes past the end of the file")
            self._places[storage.key] = offset, numel
            file.seek(storage.nbytes, 1)
        if missing := [key for key in self._storages if key not in self._places]:
            raise ValueError(f"storage {shown(missing[0])} is missing")
        return content

    def _stretch(self, storage: Storage) -> bytes:
        self._file.seek(self._places[storage.key][0])
        return self._file.read(storage.nbytes)
