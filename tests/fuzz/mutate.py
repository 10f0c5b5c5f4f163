"""Seeded mutators: of bytes, of JSON, of safetensors headers, of the pickle in a zip of torch.save."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

SIZES = [0, 1, 7, 255, 2**15, 2**16 - 1, 2**27, 2**31 - 1, 2**31, 2**32 - 1, 10**12, 2**48, 2**53, 2**63 - 1, 2**64 - 1]
TEXTS = [
    b"", b"\0", b"\n", b"\t", b"[" * 3000, b'{"a":' * 2000, b"\xff\xfe", b"\xef\xbb\xbf", b"9" * 5000, b"\\ud800",
    b"NaN", b"-Infinity", b"1e999", b"null", b"true", b'"', b"\xc3", "\u202e\u0130".encode(), b"A" * 4096,
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, -1, 1.5, 1e308, float("nan"), float("inf"), 10**6, 2**31, 2**63, 10**299, "", "abc", "\0",
    "\ud800", "x" * 5000, "../../etc", "[bold]", [], [[]], [1, 2], ["a", "a"], ["a", None], {}, {"a": {"b": []}},
    "false", "1", 99, "NaN",
]  # fmt: skip


def mutate(content: bytes, rng: random.Random, other: bytes, shape: str) -> bytes:
    """One to three changes: of the bytes, or of what the bytes stand for (``shape``: json, jsonl, safetensors, zip)."""
    structural: Callable[[bytes, random.Random], bytes] | None = _STRUCTURAL.get(shape)
    for _ in range(rng.choice((1, 1, 2, 3))):
        if structural is not None and rng.random() < 0.6:
            try:
                content = structural(content, rng)
                continue
            except Exception:
                pass  # an earlier change broke it already
        content = rng.choice(_BYTES)(content, rng, other)
    return content


# -- bytes -------------------------------------------------------------------------------------------------------


def _flip(content: bytes, rng: random.Random, _: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 4, 32)) if changed else 0):
        changed[_place(changed, rng)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(content: bytes, rng: random.Random, _: bytes) -> bytes:
    return content[: rng.randint(0, len(content))]


def _remove(content: bytes, rng: random.Random, _: bytes) -> bytes:
    start = _place(content, rng)
    return content[:start] + content[start + rng.choice((1, 4, 64, 1000)) :]


def _splice(content: bytes, rng: random.Random, other: bytes) -> bytes:
    start, source, length = _place(content, rng), _place(other, rng), rng.choice((1, 8, 100, 2000))
    skipped = length if rng.random() < 0.5 else 0
    return content[:start] + other[source : source + length] + content[start + skipped :]


def _insert(content: bytes, rng: random.Random, _: bytes) -> bytes:
    start = _place(content, rng)
    return content[:start] + rng.choice(TEXTS) + content[start:]


def _length(content: bytes, rng: random.Random, _: bytes) -> bytes:
    """A number of 1 to 8 bytes becomes another: most often one near the start or the end."""
    width, size = rng.choice((1, 2, 4, 8)), rng.choice(SIZES)
    start = 0 if rng.random() < 0.2 else _place(content, rng)
    return content[:start] + (size % 256**width).to_bytes(width, "little") + content[start + width :]


def _repeat(content: bytes, rng: random.Random, _: bytes) -> bytes:
    start = _place(content, rng)
    part = content[start : start + rng.choice((1, 5, 50))]
    return content[:start] + part * rng.choice((2, 50, 2000)) + content[start:]


_BYTES = (_flip, _cut, _remove, _splice, _insert, _length, _repeat)


def _place(content: bytes | bytearray, rng: random.Random) -> int:
    """Somewhere; where a file says what it holds, its first and last kilobyte, more often than elsewhere."""
    if not content:
        return 0
    span = min(len(content), 1024)
    return rng.choice((rng.randrange(len(content)), rng.randrange(span), len(content) - 1 - rng.randrange(span)))


# -- what the bytes stand for ------------------------------------------------------------------------------------


def swap(value: Any, rng: random.Random) -> Any:
    """The same JSON value with one part changed, renamed, doubled or left out."""
    if isinstance(value, str) and value[:1] in ("[", "{") and rng.random() < 0.7:
        try:
            return json.dumps(swap(json.loads(value), rng))
        except ValueError:
            pass
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return rng.choice(VALUES) if rng.random() < 0.8 else rng.choice(SIZES)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key, copy = rng.choice(keys), value.copy()
    how = rng.random()
    if how < 0.1:
        del copy[key]
    elif how < 0.2 and isinstance(copy, dict):
        copy[rng.choice(["", "extra", "\0", "a" * 300, str(rng.choice(keys))])] = copy.pop(key)
    elif how < 0.3 and isinstance(copy, list):
        copy.extend([copy[key]] * rng.choice((1, 1, 300)))
    elif how < 0.4:
        copy[key] = value[rng.choice(keys)]
    else:
        copy[key] = swap(copy[key], rng)
    return copy


def _json(content: bytes, rng: random.Random) -> bytes:
    return json.dumps(swap(json.loads(content), rng)).encode(errors="surrogatepass")


def _jsonl(content: bytes, rng: random.Random) -> bytes:
    lines = content.split(b"\n")
    i = rng.randrange(len(lines))
    lines[i] = _json(lines[i], rng)
    return b"\n".join(lines)


def _safetensors(content: bytes, rng: random.Random) -> bytes:
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    how = rng.random()
    if how < 0.4 and isinstance(header.get("__metadata__"), dict):
        changed = swap(header["__metadata__"], rng)
        header["__metadata__"] = {str(k): v if isinstance(v, str) else json.dumps(v) for k, v in dict(changed).items()}
    elif how < 0.6 and names:
        entry = header[rng.choice(names)]
        kind = rng.choice(["F16", "BF16", "I32", "U32", "F32", "F64", "I64", "C64", "BOOL", "F8_E4M3", "U8", "F4"])
        width = {"F16": 2, "BF16": 2, "F64": 8, "I64": 8, "C64": 8, "BOOL": 1, "F8_E4M3": 1, "U8": 1}.get(kind, 4)
        count = (entry["data_offsets"][1] - entry["data_offsets"][0]) // width
        rows = entry["shape"][0] if len(entry["shape"]) == 2 and count % max(1, entry["shape"][0]) == 0 else 0
        entry["dtype"], entry["shape"] = kind, [rows, count // rows] if rows else [count]
    elif how < 0.8 and names:
        entry = header[rng.choice(names)]  # the same numbers in another shape
        count = 1
        for extent in entry["shape"]:
            count *= extent
        entry["shape"] = rng.choice(([count], [1, count], [count, 1], [1] * 20 + [count], entry["shape"][::-1]))
    elif how < 0.9 and len(names) > 1:
        one, two = rng.sample(names, 2)
        header[one], header[two] = header[two], header[one]
    else:
        header = swap(header, rng)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def _zip(content: bytes, rng: random.Random) -> bytes:
    """A member's bytes change, and its checksum with them; most often the pickle's."""
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        if sum(info.file_size for info in file.infolist()) > 1 << 24:
            raise ValueError("too large")
        members = {name: file.read(name) for name in file.namelist()}
    chosen = [name for name in members if name.endswith("data.pkl")] if rng.random() < 0.7 else list(members)
    name = rng.choice(chosen or list(members))
    members[name] = rng.choice(_BYTES)(members[name], rng, members[rng.choice(list(members))])
    if rng.random() < 0.1:
        del members[rng.choice(list(members))]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", rng.choice((zipfile.ZIP_STORED,) * 9 + (zipfile.ZIP_DEFLATED,))) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return buffer.getvalue()


_STRUCTURAL = {"json": _json, "jsonl": _jsonl, "safetensors": _safetensors, "zip": _zip}
