"""Records out of local files and Hub datasets, and their fields; one broken line never ends the run."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..schema import MAX_DIGITS, brief, not_text

MAX_LINE = 16 << 20
"""Bytes; a longer line is no record."""
MAX_TEXT = 100_000
"""Characters of one text; no context takes more, and what looks for wordings compares texts with each other."""
_FILE_ENDINGS = (".tsv", ".txt", ".csv", ".json", ".jsonl")


@dataclass(frozen=True)
class Example:
    """One edit: after it, ``prompt`` is answered with ``target``."""

    prompt: str
    target: str
    subject: str | None = None
    answers: tuple[str, ...] = ()
    """What is true, or what the data calls the current answers; the target itself where no edit is meant."""
    rephrasings: tuple[str, ...] = ()
    """Other wordings of the prompt."""
    locality: tuple[tuple[str, str | None], ...] = ()
    """Prompts that the edit must leave alone, with their answers where known."""
    portability: tuple[tuple[str, str], ...] = ()
    """Questions whose answers follow from the edit."""
    source: str = ""
    """File and line, or dataset and row."""
    together: tuple[Example, ...] = ()
    """Edits that are made with this one, as its questions need them all (the several edits of a multi-hop question)."""

    @property
    def parts(self) -> tuple[Example, ...]:
        """This edit and those that are made with it."""
        return (self, *self.together)


@dataclass(frozen=True)
class Problem:
    """A record that could not be read, or (``kept``) one that was read and deserves a look."""

    file: str
    line: int
    """Counted from 1; the row of a Hub dataset."""
    field: str
    """"" where the whole line is meant."""
    message: str
    kept: bool = False

    def __str__(self) -> str:
        field = f", {self.field}" if self.field else ""
        return f"{self.file}:{self.line}{field}: {self.message}" + (" (kept)" if self.kept else "")


class _Digits:
    """An integer that is too long to be one; whoever reads the field refuses it, and the other records stay."""

    def __init__(self, digits: str):
        self.count = len(digits)

    def __str__(self) -> str:
        return f"an integer of {self.count:,} digits"


_DECODER = json.JSONDecoder(parse_int=lambda digits: int(digits) if len(digits) <= MAX_DIGITS else _Digits(digits))


class Bad(Exception):
    """Raised by a parser: what is wrong with a record, and in which field."""

    def __init__(self, field: str, message: str):
        super().__init__(message)
        self.field, self.message = field, message


Records = Iterator[tuple[int, "dict[str, Any] | Bad"]]


def read_examples(
    source: str | Path,
    parse: Callable[[Any], tuple[Example, str]],
    *,
    limit: int | None = None,
    columns: tuple[str, str] = ("question", "answer"),
    tabs: bool | None = None,
) -> tuple[list[Example], list[Problem]]:
    """Read edits from a local file or, through ``datasets``, from the Hub.

    Args:
        source: a .tsv, .json or .jsonl file in UTF-8, or a Hub dataset's name: "owner/name",
            "owner/name:split" or "owner/name:configuration:split".
        parse: makes one record into an example, and names the field whose target is already the answer (""
            where it is not); raises :class:`Bad`.
        limit: stop after so many examples.
        columns: the fields of a line with a tab.
        tabs: whether lines are split at tabs; None: where they are no JSON.

    Returns:
        The examples, and the problems: records that were skipped, and ones that were kept though their
        target is already the answer.

    Raises:
        ValueError: no such file or dataset, ``datasets`` not installed, no example in it.
    """
    examples: list[Example] = []
    problems: list[Problem] = []
    for line, record in open_records(source, limit, columns, tabs):
        if limit is not None and len(examples) >= limit:
            break
        try:
            if isinstance(record, Bad):
                raise record
            example, flagged = parse(record)
        except RecursionError:
            problems.append(Problem(str(source), line, "", "is nested too deeply"))
            continue
        except Bad as bad:
            problems.append(Problem(str(source), line, bad.field, bad.message))
            continue
        examples.append(replace(example, source=f"{source}:{line}"))
        if flagged:
            message = f"{brief(repr(example.target), 60)} is already the answer, so there is nothing to change"
            problems.append(Problem(str(source), line, flagged, message, kept=True))
    if not examples:
        why = f"{len(problems)} skipped, the first: {problems[0]}" if problems else "it is empty"
        raise ValueError(f"No {' and '.join(columns)} was found in {source}: {why}.")
    return examples, problems


def open_records(
    source: str | Path, limit: int | None, columns: tuple[str, str] = ("question", "answer"), tabs: bool | None = None
) -> Records:
    """The records of a file or Hub dataset; see :func:`read_examples`."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1, or None for everything.")
    path = Path(source)
    if path.is_dir():
        raise ValueError(f"{source} is a folder; pass the file in it, or a Hub dataset's name.")
    if path.exists():
        return _file_records(path, columns, tabs)
    if path.suffix.lower() in _FILE_ENDINGS:
        raise ValueError(f"There is no file {source}; pass one that exists, or a Hub dataset's name.")
    return hub_records(str(source))


# -- files and datasets ------------------------------------------------------------------------------------


def _file_records(path: Path, columns: tuple[str, str], tabs: bool | None) -> Records:
    with path.open("rb") as file:
        start = file.read(4096)
    _refuse_other_encodings(path, start)
    start = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if tabs or (tabs is None and start[:1] not in (b"[", b"{")):
        return _tsv_records(path, columns)
    return _array_records(path) if start[:1] == b"[" else _jsonl_records(path)


def lines(path: Path) -> Iterator[tuple[int, str | Bad]]:
    """The numbered lines of a UTF-8 file that are not blank.

    Raises:
        ValueError: all of the file is in another encoding.
    """
    with path.open("rb") as file:
        _refuse_other_encodings(path, file.read(4096))
        file.seek(0)
        for number in itertools.count(1):
            raw = file.readline(MAX_LINE)
            if not raw:
                return
            if len(raw) == MAX_LINE and not raw.endswith(b"\n"):
                while raw and not raw.endswith(b"\n"):
                    raw = file.readline(MAX_LINE)
                yield number, Bad("", f"has more than {MAX_LINE:,} bytes, which is no record")
                continue
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                yield number, _not_utf8(error)
                continue
            if "\0" in line:
                yield number, Bad("", "holds a NUL character, as text of another encoding does; save it as UTF-8")
            elif line.strip():
                yield number, line


_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def _refuse_other_encodings(path: Path, start: bytes) -> None:
    """By the mark at the start and NULs behind it, or by NULs alone, which every other byte of such a file is."""
    found = next((name for mark, name in _MARKS.items() if start.startswith(mark) and 0 in start), None)
    if found is None and start.count(0) * 3 > len(start):
        found = "UTF-16 or another wide encoding"
    if found:
        raise ValueError(f"{path} is in {found}; save it as UTF-8 (iconv -f UTF-16 -t UTF-8 FILE).")


def _not_utf8(error: UnicodeDecodeError) -> Bad:
    return Bad("", f"is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8")


def _tsv_records(path: Path, columns: tuple[str, str]) -> Records:
    for number, line in lines(path):
        if isinstance(line, Bad):
            yield number, line
            continue
        fields = line.rstrip("\r\n").split("\t")
        if number == 1 and tuple(field.strip().lower() for field in fields) in (columns, _HEADER):
            continue
        if len(fields) != 2:
            found = f"{len(fields)} field" + "s" * (len(fields) != 1)
            yield number, Bad("", f"has {found} between tabs; a line is {' TAB '.join(columns)}")
            continue
        yield number, dict(zip(columns, fields, strict=True))


_HEADER = ("prompt", "target")


def _jsonl_records(path: Path) -> Records:
    for number, line in lines(path):
        if not isinstance(line, Bad):
            try:
                line = _DECODER.decode(line)
            except (ValueError, RecursionError) as error:
                line = Bad("", f"is no JSON: {brief(error)}")
        yield number, line


def _array_records(path: Path) -> Records:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield 1, _not_utf8(error)
        return
    at, line = text.index("[") + 1, 1
    counted = 0
    while True:
        at = _GAP.match(text, at).end()
        line, counted = line + text.count("\n", counted, at), at
        if text[at : at + 1] == "]":
            return
        try:
            record, at = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            # Inside an array nothing says where the next record starts.
            yield line, Bad("", f"is no JSON, and the rest of the array is lost with it: {brief(error)}")
            return
        yield line, record


_GAP = re.compile(r"[\s,]*")


def hub_records(name: str) -> Records:
    """The rows of a Hub dataset: "owner/name", "owner/name:split" or "owner/name:configuration:split"."""
    dataset, *parts = name.split(":")
    split = parts[-1] if parts else None
    configuration = parts[0] if len(parts) == 2 else None
    if len(parts) > 2 or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", dataset):
        raise ValueError(f"{name!r} is no file here, nor a Hub dataset's name (owner/name:split).")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(
            f"There is no file {name}, and reading the Hub dataset of that name needs the package datasets: "
            "pip install datasets."
        ) from error
    try:
        loaded = load_dataset(dataset, configuration, split=split)
    except Exception as error:
        raise ValueError(f"No file {name} here, and no such dataset from the Hub: {error}.") from error
    if isinstance(loaded, dict):
        if len(loaded) > 1:
            splits = " or ".join(f"{dataset}:{split}" for split in loaded)
            raise ValueError(f"{name} has several splits; choose one of them: {splits}.")
        loaded = next(iter(loaded.values()))
    return ((row, dict(record)) for row, record in enumerate(loaded, 1))


# -- fields ------------------------------------------------------------------------------------------------


def show(value: Any) -> str:
    """A value as a sentence names it."""
    if value is None:
        return "missing"
    if isinstance(value, str):  # only as much as is shown: a value may be of any size
        value = value[:60]
    elif isinstance(value, (list, dict, tuple)):
        value = _few(value)
    text = json.dumps(value, ensure_ascii=bool(isinstance(value, str) and not_text(value)), default=str)
    return f"{text[:37]}..." if len(text) > 40 else text


def printable(name: str) -> str:
    """A field's name, lone surrogates escaped."""
    return name.encode(errors="backslashreplace").decode()


def _few(value: Any, depth: int = 3) -> Any:
    """A list or object cut to what 40 characters can show."""
    if isinstance(value, str):
        return printable(value[:60])
    if isinstance(value, (list, tuple)):
        return [_few(item, depth - 1) for item in value[:20]] if depth else "..."
    if isinstance(value, dict):
        items = itertools.islice(value.items(), 20)
        return {str(_few(str(key))): _few(item, depth - 1) for key, item in items} if depth else "..."
    return value


def required(record: dict[str, Any], *names: str, prefix: str = "") -> str:
    """The first text of the first field that is there; :class:`Bad` where there is none."""
    found = texts(record, *names, prefix=prefix)
    if not found:
        present = next((name for name in names if name in record), names[0])
        raise Bad(prefix + present, "is empty" if present in record else "is missing")
    return found[0]


def optional(record: dict[str, Any], *names: str) -> str | None:
    """The first text of the first field that is there, or None."""
    return next(iter(texts(record, *names)), None)


def texts(record: dict[str, Any], *names: str, prefix: str = "") -> tuple[str, ...]:
    """The non-empty texts in the first field that is there: one text, or lists of them to any depth."""
    for name in names:
        value = record.get(name)
        if value is not None and value == value:  # NaN is how tables write a field that is missing
            return tuple(text for text in flat(value, prefix + name) if text)
    return ()


def flat(value: Any, field: str) -> Iterator[str]:
    """The texts in a text or in lists of them."""
    if isinstance(value, str):
        value = value.strip()
        if len(value) > MAX_TEXT:
            raise Bad(field, f"has {len(value):,} characters; at most {MAX_TEXT:,} are read")
        if why := not_text(value):
            raise Bad(field, why)
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from flat(item, field)
    else:
        raise Bad(field, f"is or holds {show(value)}; it must be text or a list of texts")


def others(prompt: str, texts: Iterable[str]) -> tuple[str, ...]:
    """The distinct texts that are not the prompt."""
    return tuple(text for text in dict.fromkeys(texts) if text != prompt)


def rewritten(rewrite: dict[str, Any], name: str, prefix: str) -> str:
    """A target of ROME's kind, a text or {"str": text}."""
    value = rewrite.get(name)
    return required({name: value.get("str") if isinstance(value, dict) else value}, name, prefix=prefix)


def pairs(record: dict[str, Any], name: str, *, answer_needed: bool) -> tuple[tuple[str, Any], ...]:
    """(prompt, answer) pairs: a list of objects, pairs or texts, one object, or such lists in groups."""
    return tuple(pair for pair in _pairs_in(record.get(name), name) if pair[1] or not answer_needed)


def beside(record: dict[str, Any], prompts: str, *answers: str) -> tuple[tuple[str, str | None], ...]:
    """(prompt, answer) pairs in two fields side by side."""
    asked = texts(record, prompts)
    return tuple(itertools.zip_longest(asked, texts(record, *answers)[: len(asked)]))


def _pairs_in(value: Any, field: str) -> Iterator[tuple[str, str | None]]:
    if value is None:
        return
    if isinstance(value, str):
        yield next(flat(value, field)), None
    elif isinstance(value, dict):
        prompt = optional(value, *_PAIR_PROMPTS)
        if prompt is not None:
            yield prompt, optional(value, *_PAIR_ANSWERS)
        else:
            for group, items in value.items():
                yield from _pairs_in(items, f"{field}.{group}")
    elif isinstance(value, (list, tuple)):
        for item in value:
            if isinstance(item, (list, tuple)) and item and isinstance(item[0], str) and len(item) <= 2:
                prompt, *answer = flat(list(item) if item[-1] else item[0], field)
                yield prompt, answer[0] if answer else None
            else:
                yield from _pairs_in(item, field)
    else:
        raise Bad(field, f"is or holds {show(value)}; it must be pairs of prompt and answer")


_PAIR_PROMPTS = ("prompt", "question", "New Question")
_PAIR_ANSWERS = ("answer", "target", "ground_truth", "New Answer")


# -- what is not used --------------------------------------------------------------------------------------


class Noted(dict[str, Any]):
    """A JSON object, with those in it, that notes which of its fields were asked for."""

    def __init__(self, values: dict[str, Any]):
        super().__init__((name, _noted(value)) for name, value in values.items())
        self._asked: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self._asked.add(name)
        return super().get(name, default)

    def __getitem__(self, name: str) -> Any:
        self._asked.add(name)
        return super().__getitem__(name)

    def items(self) -> Any:
        self._asked.update(self)
        return super().items()

    def unread(self, prefix: str = "") -> Iterator[str]:
        """The fields that hold something and that nobody asked for, by their paths."""
        for name, value in super().items():
            if name not in self._asked:
                if value is not None and value == value and value not in ("", [], {}):
                    yield prefix + name
            else:
                yield from _unread(value, f"{prefix}{name}.")


def _noted(value: Any) -> Any:
    if isinstance(value, dict):
        return Noted(value)
    return [_noted(item) for item in value] if isinstance(value, (list, tuple)) else value


def _unread(value: Any, prefix: str) -> Iterator[str]:
    if isinstance(value, Noted):
        yield from value.unread(prefix)
    elif isinstance(value, list):
        for item in value:
            yield from _unread(item, prefix)
