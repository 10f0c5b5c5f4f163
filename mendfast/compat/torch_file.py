"""Files of ``torch.save``, read without importing, calling or running anything that they name.

Both layouts are known: the zip archive (torch >= 1.6) and the older run of pickles. Of the globals that a pickle
names, only the containers and tensors listed here mean something; every other one becomes an :class:`Inert` class
that keeps its name and what it was given. Tensors stay in the file until they are asked for.

Source of the layouts: ``torch/serialization.py`` and ``torch/_utils.py`` of PyTorch 1.4 and 2.x.
"""

from __future__ import annotations

import math
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
_DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


class Inert:
    """Stands for an object of a class that was not looked up: its name, its arguments and its state.

    ``origin`` ("package.module.Name") belongs to the class, ``state`` (most often a dict) to the object.
    """

    origin = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        self = object.__new__(cls)
        self.args, self.kwargs, self.state, self.items = args, kwargs, None, []
        return self

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        return type(self)(*args, **kwargs)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, item: Any) -> None:
        self.items.append(item)

    def extend(self, items: Any) -> None:
        self.items.extend(items)

    add = append

    def __repr__(self) -> str:
        return f"<{self.origin}, not loaded>"


class Storage(NamedTuple):
    """Numbers in the file."""

    key: str
    dtype: torch.dtype
    numel: int


class StoredTensor(NamedTuple):
    """A tensor in the file; :meth:`TorchFile.tensor` reads it."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size


def _stored_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> StoredTensor:
    numbers = (offset, *size, *stride)
    if not isinstance(storage, Storage) or not all(isinstance(x, int) and x >= 0 for x in numbers):
        raise pickle.UnpicklingError("a tensor whose storage or shape can't be read")
    last = offset + sum((extent - 1) * step for extent, step in zip(size, stride, strict=True))
    numel = math.prod(size)
    if numel > storage.numel or (numel and last >= storage.numel):
        raise pickle.UnpicklingError(
            f"a tensor of shape {tuple(size)} in a storage of {storage.numel} numbers"
        )
    return StoredTensor(storage, offset, tuple(size), tuple(stride))


class _Rebuild:
    """A function that a pickle may call but, unlike a plain one, not set attributes of."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a function with a state")


class _Dict(dict):
    """For OrderedDict; the state of a state dict (its ``_metadata``) is dropped."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


_KNOWN = {
    ("collections", "OrderedDict"): _Dict,
    ("torch._utils", "_rebuild_tensor_v2"): _Rebuild(_stored_tensor),
    ("torch._utils", "_rebuild_tensor"): _Rebuild(_stored_tensor),
    ("torch._utils", "_rebuild_parameter"): _Rebuild(lambda data, *_: data),
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
    **{("torch.cuda", name): dtype for name, dtype in _DTYPES.items()},
}


class _Unpickler(pickle.Unpickler):
    """Resolves every global by ``_KNOWN`` or to an inert class: nothing is imported, nothing foreign is called."""

    def __init__(self, file: BinaryIO):
        super().__init__(file, encoding="utf-8")
        self._inert: dict[tuple[str, str], type[Inert]] = {}

    def find_class(self, module: str, name: str) -> Any:
        known = _KNOWN.get((module, name))
        if known is not None:
            return known
        if (module, name) not in self._inert:
            self._inert[module, name] = type("Inert", (Inert,), {"origin": f"{module}.{name}"})
        return self._inert[module, name]

    def persistent_load(self, saved: Any) -> Any:
        if not isinstance(saved, tuple) or len(saved) < 5 or saved[0] != "storage":
            return Inert(saved)
        _, dtype, key, _, numel, *view = saved
        readable = isinstance(dtype, torch.dtype) and isinstance(numel, int) and numel >= 0
        if not readable or any(part is not None for part in view):
            return Inert(saved)
        return Storage(str(key), dtype, numel)


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
        self._places: dict[str, tuple[int, int]] = {}  # key -> offset, number of elements; the older layout
        self._file = open(self.path, "rb")  # noqa: SIM115
        try:
            self.content = self._read_zip() if zipfile.is_zipfile(self._file) else self._read_pickles()
        except Exception as error:  # a broken pickle raises nearly anything
            self.close()
            raise ValueError(
                f"{self.path} is no whole file of torch.save ({error or type(error).__name__}); "
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
            ValueError: its numbers are missing from the file or damaged.
        """
        key, dtype, numel = stored.storage
        try:
            content = (
                self._member(f"data/{key}").read()
                if self._zip
                else self._stretch(key, numel * dtype.itemsize)
            )
        except (KeyError, OSError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
            raise ValueError(f"{self.path} is damaged: {error}. Fetch it again.") from error
        if len(content) != numel * dtype.itemsize:
            raise ValueError(
                f"{self.path} is damaged: storage {key} has {len(content)} bytes where "
                f"{numel * dtype.itemsize} were announced. Fetch it again."
            )
        flat = torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return flat.as_strided(stored.size, stored.stride, stored.offset).clone()

    # -- zip, torch >= 1.6 ---------------------------------------------------------------------------------

    def _read_zip(self) -> Any:
        self._zip = zipfile.ZipFile(self._file)
        roots = [name[: -len("data.pkl")] for name in self._zip.namelist() if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise ValueError("a zip without torch's data.pkl")
        self._root = roots[0]
        if f"{self._root}byteorder" in self._zip.namelist() and self._member("byteorder").read() != b"little":
            raise ValueError("saved on a big-endian machine")
        return _Unpickler(self._member("data.pkl")).load()

    def _member(self, name: str) -> BinaryIO:
        info = self._zip.getinfo(self._root + name)
        if info.compress_type != zipfile.ZIP_STORED:  # torch never compresses; a small file may not grow huge
            raise zipfile.BadZipFile(f"{info.filename} is compressed")
        return self._zip.open(info)

    # -- pickles one after another, torch < 1.6 ------------------------------------------------------------

    def _read_pickles(self) -> Any:
        file = self._file
        file.seek(0)
        if _Unpickler(file).load() != LEGACY_MAGIC or _Unpickler(file).load() != LEGACY_PROTOCOL:
            raise ValueError("neither torch's zip nor its older layout")
        if not _Unpickler(file).load().get("little_endian", True):
            raise ValueError("saved on a big-endian machine")
        unpickler = _SizesUnpickler(file)
        content = unpickler.load()
        end = self.path.stat().st_size
        for key in _Unpickler(file).load():
            (numel,) = struct.unpack("<q", file.read(8))
            offset = file.tell()
            self._places[str(key)] = offset, numel
            if not 0 <= numel * unpickler.widths[str(key)] <= end - offset:
                raise ValueError(f"storage {key} goes past the end of the file")
            file.seek(numel * unpickler.widths[str(key)], 1)
        return content

    def _stretch(self, key: str, size: int) -> bytes:
        self._file.seek(self._places[key][0])
        return self._file.read(size)


class _SizesUnpickler(_Unpickler):
    """Also notes the width of each storage's numbers, which the older layout needs to step over them."""

    def __init__(self, file: BinaryIO):
        super().__init__(file)
        self.widths: dict[str, int] = {}

    def persistent_load(self, saved: Any) -> Any:
        storage = super().persistent_load(saved)
        if isinstance(storage, Storage):
            self.widths[storage.key] = storage.dtype.itemsize
        return storage
