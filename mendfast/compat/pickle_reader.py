"""Pickles read as data: a machine for their instructions that imports, calls and builds nothing of what they name.

Every global becomes an :class:`Inert`, and so does whatever is made by calling one, but for the few names that the
caller knows. What a pickle can cost is bounded: instructions, places in the memo, bytes that it announces, lengths of
numbers, and keys of dicts, whose hash would recurse into what they hold.

Source of the instructions: ``Lib/pickletools.py`` of CPython.
"""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from ..schema import shown

MAX_INSTRUCTIONS = 500_000
MAX_LINE = 4_096
MAX_NUMBER_BYTES = 32
_ATOMS = (str, bytes, int, float, bool, type(None))


class BrokenPickle(ValueError):
    """The pickle can't be read."""


class Inert:
    """Stands for a global that was not looked up, or an object made by calling it.

    ``origin`` is its name, "package.module.Name"; ``args`` what it was called with, None where it was not;
    ``state`` (most often a dict) and ``items`` what it was given since.
    """

    __slots__ = ("origin", "args", "state", "items")

    def __init__(self, origin: str, args: tuple[Any, ...] | None = None):
        self.origin, self.args, self.state, self.items = origin, args, None, None

    def add(self, item: Any) -> None:
        self.items = self.items if self.items is not None else []
        self.items.append(item)

    def __repr__(self) -> str:
        return f"<{self.origin[:60]}, not loaded>"


class Known:
    """A global that the reader knows: ``make`` gets the arguments of a call. Not a function that a pickle holds."""

    __slots__ = ("make",)

    def __init__(self, make: Callable[..., Any]):
        self.make = make


class PickleReader:
    """Reads one pickle after another from ``file``, of which ``size`` bytes are left.

    Args:
        known: (module, name) -> a :class:`Known`, or a value that the global stands for.
        persistent: makes what a persistent id stands for.
    """

    def __init__(
        self,
        file: BinaryIO,
        size: int,
        known: Mapping[tuple[str, str], Any],
        persistent: Callable[[Any], Any],
    ):
        self._file, self._end = file, file.tell() + size
        self._known, self._persistent = known, persistent
        self._left = MAX_INSTRUCTIONS
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        """What the next pickle holds.

        Raises:
            BrokenPickle: it ends early, is none, or costs more than a file of torch.save does.
        """
        self._stack, self._marks, self._memo = [], [], {}
        while True:
            self._spend(1)
            code = self._file.read(1)
            if code == b".":
                return self._pop()
            do = _DO.get(code)
            if do is None:
                raise BrokenPickle(f"the pickle ends early or holds an unknown instruction, {code!r}")
            do(self)

    # -- the machine's parts -------------------------------------------------------------------------------------

    def _spend(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise BrokenPickle(f"a pickle of more than {MAX_INSTRUCTIONS:,} instructions")

    def _bytes(self, count: int) -> bytes:
        if not 0 <= count <= self._end - self._file.tell():
            raise BrokenPickle("a text or number that goes past the end of the file")
        return self._file.read(count)

    def _uint(self, width: int) -> int:
        return int.from_bytes(self._bytes(width), "little")

    def _line(self) -> bytes:
        line = self._file.readline(MAX_LINE)
        if not line.endswith(b"\n"):
            raise BrokenPickle("a line that does not end")
        return line[:-1]

    def _name(self) -> str:
        return self._line().decode()

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        if not self._stack or (self._marks and self._marks[-1] == len(self._stack)):
            raise BrokenPickle("an instruction that finds nothing to work on")
        return self._stack.pop()

    def _top(self) -> Any:
        value = self._pop()
        self._stack.append(value)
        return value

    def _marked(self) -> list[Any]:
        if not self._marks:
            raise BrokenPickle("an end without a start")
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def _put(self, index: int) -> None:
        if index > MAX_INSTRUCTIONS:
            raise BrokenPickle(f"place {shown(index)} of the memo")
        self._memo[index] = self._top()

    def _get(self, index: int) -> None:
        if index not in self._memo:
            raise BrokenPickle(f"place {shown(index)} of the memo, which is empty")
        self._push(self._memo[index])

    def _global(self, module: Any, name: Any) -> Any:
        if not isinstance(module, str) or not isinstance(name, str):
            raise BrokenPickle("a global whose name is no text")
        known = self._known.get((module, name))
        return Inert(f"{module}.{name}") if known is None else known

    def _call(self, function: Any, args: Any) -> Any:
        if not isinstance(args, (tuple, list)):
            raise BrokenPickle(f"a call with {shown(args)}")
        self._spend(len(args))
        if isinstance(function, Known):
            return function.make(*args)
        if isinstance(function, Inert):
            return Inert(function.origin, tuple(args))
        raise BrokenPickle(f"a call of {shown(function)}")

    def _append(self, target: Any, values: list[Any]) -> None:
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, Inert):
            for value in values:
                target.add(value)
        elif isinstance(target, set):
            target.update(_key(value) for value in values)
        else:
            raise BrokenPickle(f"items for {shown(target)}")

    def _set(self, target: Any, values: list[Any]) -> None:
        if len(values) % 2:
            raise BrokenPickle("a key without a value")
        pairs = zip(values[::2], values[1::2], strict=True)
        if isinstance(target, dict):
            for key, value in pairs:
                target[_key(key)] = value
        elif isinstance(target, Inert):
            for pair in pairs:
                target.add(pair)
        else:
            raise BrokenPickle(f"keys for {shown(target)}")

    def _build(self) -> None:
        state, target = self._pop(), self._top()
        if isinstance(target, Inert):
            target.state = state
        elif isinstance(target, Known):
            raise BrokenPickle("a function with a state")
        elif not isinstance(target, dict):  # of a state dict it is the _metadata, which nobody needs
            raise BrokenPickle(f"a state for {shown(target)}")

    def _reduce(self) -> None:
        args = self._pop()
        self._push(self._call(self._pop(), args))

    def _new_with_names(self) -> None:
        self._pop()
        self._reduce()

    def _stack_global(self) -> None:
        name = self._pop()
        self._push(self._global(self._pop(), name))

    def _inst(self) -> None:
        module, name = self._name(), self._name()
        self._push(self._call(self._global(module, name), self._marked()))

    def _obj(self) -> None:
        function, *args = self._marked() or [None]
        self._push(self._call(function, args))

    def _number(self, text: bytes) -> int:
        if len(text) > 3 * MAX_NUMBER_BYTES:
            raise BrokenPickle(f"an integer of {len(text):,} digits")
        return int(text)

    def _int(self) -> None:
        text = self._line()
        self._push({b"00": False, b"01": True}[text] if text in (b"00", b"01") else self._number(text))

    def _signed(self, width: int) -> None:
        if width > MAX_NUMBER_BYTES:  # torch's magic number is the longest, of 10
            raise BrokenPickle(f"an integer of {width:,} bytes")
        self._push(int.from_bytes(self._bytes(width), "little", signed=True))

    def _string(self) -> None:
        text = self._line().strip()
        if len(text) < 2 or text[:1] not in b"'\"" or text[:1] != text[-1:]:
            raise BrokenPickle("a text without quotes")
        self._push(_decoded(codecs.escape_decode(text[1:-1])[0]))

    def _tuple(self, count: int) -> None:
        self._push(tuple(self._pop() for _ in range(count))[::-1])

    def _frozenset(self) -> None:
        self._push(frozenset(_key(value) for value in self._marked()))

    def _dict(self) -> None:
        values = self._marked()
        self._push({})
        self._set(self._stack[-1], values)

    def _end_items(self, do: Callable[[PickleReader, Any, list[Any]], None]) -> None:
        values = self._marked()
        do(self, self._top(), values)

    def _one_item(self, do: Callable[[PickleReader, Any, list[Any]], None], count: int) -> None:
        values = [self._pop() for _ in range(count)][::-1]
        do(self, self._top(), values)

    def _pop_or_unmark(self) -> None:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._pop()

    def _protocol(self) -> None:
        if (version := self._uint(1)) > 5:
            raise BrokenPickle(f"a pickle of protocol {version}")


def _key(value: Any) -> Any:
    """What may be a key: the hash of a tuple would go through all that it holds, without end if need be."""
    flat = isinstance(value, tuple) and len(value) <= 16 and all(isinstance(part, _ATOMS) for part in value)
    if not flat and not isinstance(value, (*_ATOMS, Inert)):
        raise BrokenPickle(f"{shown(value)} as a key")
    return value


def _decoded(text: bytes) -> str | bytes:
    """Text of Python 2, which may be bytes."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        return text


def _text(r: PickleReader, width: int) -> None:
    r._push(r._bytes(r._uint(width)).decode("utf-8", "surrogatepass"))


_R = PickleReader
_DO: dict[bytes, Callable[[PickleReader], Any]] = {
    b"(": lambda r: r._marks.append(len(r._stack)),
    b"0": _R._pop_or_unmark,
    b"1": _R._marked,
    b"2": lambda r: r._push(r._top()),
    b"\x80": _R._protocol,
    b"\x95": lambda r: r._bytes(8),
    # numbers
    b"I": _R._int,
    b"L": lambda r: r._push(r._number(r._line().rstrip(b"L"))),
    b"J": lambda r: r._signed(4),
    b"K": lambda r: r._push(r._uint(1)),
    b"M": lambda r: r._push(r._uint(2)),
    b"\x8a": lambda r: r._signed(r._uint(1)),
    b"\x8b": lambda r: r._signed(r._uint(4)),
    b"F": lambda r: r._push(float(r._line())),
    b"G": lambda r: r._push(struct.unpack(">d", r._bytes(8))[0]),
    b"N": lambda r: r._push(None),
    b"\x88": lambda r: r._push(True),
    b"\x89": lambda r: r._push(False),
    # text
    b"S": _R._string,
    b"T": lambda r: r._push(_decoded(r._bytes(r._uint(4)))),
    b"U": lambda r: r._push(_decoded(r._bytes(r._uint(1)))),
    b"V": lambda r: r._push(r._line().decode("raw-unicode-escape")),
    b"X": lambda r: _text(r, 4),
    b"\x8c": lambda r: _text(r, 1),
    b"\x8d": lambda r: _text(r, 8),
    b"B": lambda r: r._push(r._bytes(r._uint(4))),
    b"C": lambda r: r._push(r._bytes(r._uint(1))),
    b"\x8e": lambda r: r._push(r._bytes(r._uint(8))),
    b"\x96": lambda r: r._push(r._bytes(r._uint(8))),
    # containers
    b")": lambda r: r._push(()),
    b"t": lambda r: r._push(tuple(r._marked())),
    b"\x85": lambda r: r._tuple(1),
    b"\x86": lambda r: r._tuple(2),
    b"\x87": lambda r: r._tuple(3),
    b"]": lambda r: r._push([]),
    b"l": lambda r: r._push(r._marked()),
    b"}": lambda r: r._push({}),
    b"d": _R._dict,
    b"\x8f": lambda r: r._push(set()),
    b"\x91": _R._frozenset,
    b"a": lambda r: r._one_item(_R._append, 1),
    b"e": lambda r: r._end_items(_R._append),
    b"\x90": lambda r: r._end_items(_R._append),
    b"s": lambda r: r._one_item(_R._set, 2),
    b"u": lambda r: r._end_items(_R._set),
    # the memo
    b"p": lambda r: r._put(r._number(r._line())),
    b"q": lambda r: r._put(r._uint(1)),
    b"r": lambda r: r._put(r._uint(4)),
    b"\x94": lambda r: r._put(len(r._memo)),
    b"g": lambda r: r._get(r._number(r._line())),
    b"h": lambda r: r._get(r._uint(1)),
    b"j": lambda r: r._get(r._uint(4)),
    # objects
    b"c": lambda r: r._push(r._global(r._name(), r._name())),
    b"\x93": _R._stack_global,
    b"R": _R._reduce,
    b"b": _R._build,
    b"i": _R._inst,
    b"o": _R._obj,
    b"\x81": _R._reduce,
    b"\x92": _R._new_with_names,
    b"P": lambda r: r._push(r._persistent(r._name())),
    b"Q": lambda r: r._push(r._persistent(r._pop())),
}  # fmt: skip
