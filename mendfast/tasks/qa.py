"""Question answering: edits read from the formats that the field uses, one broken line never ending the run.

Formats, seen from the records themselves:

- ``tsv``: question TAB answer.
- ``jsonl``: one's own: prompt, target, and optionally subject, answers, rephrasings, locality, portability;
  also under EasyEdit's names (target_new, ground_truth, rephrase_prompt, locality_prompt, ...).
- ``kilt``: zsRE in the KILT style, plain or as KnowledgeEditor and MEND enrich it: input, output[].answer,
  and alternatives, rephrases, filtered_rephrases, meta.template_questions.
- ``zsre``: subject, src, pred, rephrase, alt, answers, loc, loc_ans, cond of ROME and EasyEdit.
- ``counterfact``: requested_rewrite, paraphrase_prompts, neighborhood_prompts of ROME.

Sources: Levy et al. 2017 (zsRE); Petroni et al. 2021 (KILT); De Cao et al. 2021 and Mitchell et al. 2022
(the enriched zsRE); Meng et al. 2022 (CounterFact); Yao et al. 2023 (portability).
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

FORMATS = ("auto", "tsv", "jsonl", "kilt", "zsre", "counterfact")
_FILE_ENDINGS = (".tsv", ".txt", ".csv", ".json", ".jsonl")


@dataclass(frozen=True)
class QAExample:
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


def read_qa(
    path_or_hub_name: str | Path, *, limit: int | None = None, format: str = "auto"
) -> tuple[list[QAExample], list[Problem]]:
    """Read question answering edits from a local file or, through ``datasets``, from the Hub.

    Args:
        path_or_hub_name: a .tsv, .json or .jsonl file in UTF-8, or a Hub dataset's name: "owner/name" or
            "owner/name:split".
        limit: stop after so many examples.
        format: one of "auto", "tsv", "jsonl", "kilt", "zsre", "counterfact".

    Returns:
        The examples, and the problems: records that were skipped, and ones that were kept though their
        target is already the answer.

    Raises:
        ValueError: an unknown format, no such file or dataset, ``datasets`` not installed, no example in it.
    """
    if format not in FORMATS:
        raise ValueError(f"The format {format!r} is unknown; take one of {', '.join(FORMATS)}.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1, or None for everything.")
    name = str(path_or_hub_name)
    path = Path(path_or_hub_name)
    if path.is_dir():
        raise ValueError(f"{name} is a folder; pass the file in it, or a Hub dataset's name.")
    if path.exists():
        records = _file_records(path, format)
    elif path.suffix.lower() in _FILE_ENDINGS:
        raise ValueError(f"There is no file {name}; pass one that exists, or a Hub dataset's name.")
    else:
        records = _hub_records(name)
    examples: list[QAExample] = []
    problems: list[Problem] = []
    for line, record in records:
        if limit is not None and len(examples) >= limit:
            break
        try:
            if isinstance(record, _Bad):
                raise record
            example, flagged = _parse(record, format)
        except _Bad as bad:
            problems.append(Problem(name, line, bad.field, bad.message))
            continue
        examples.append(replace(example, source=f"{name}:{line}"))
        if flagged:
            message = f"{example.target!r} is already the answer, so there is nothing to change"
            problems.append(Problem(name, line, flagged, message, kept=True))
    if not examples:
        why = f"{len(problems)} skipped, the first: {problems[0]}" if problems else "it is empty"
        raise ValueError(f"No question and answer was found in {name}: {why}.")
    return examples, problems


class _Bad(Exception):
    def __init__(self, field: str, message: str):
        super().__init__(message)
        self.field, self.message = field, message


Records = Iterator[tuple[int, "dict[str, Any] | _Bad"]]


# -- records out of files and datasets -------------------------------------------------------------


def _file_records(path: Path, format: str) -> Records:
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if format == "tsv" or (format == "auto" and start[:1] not in (b"[", b"{")):
        return _tsv_records(path)
    return _array_records(path) if start[:1] == b"[" else _jsonl_records(path)


def _lines(path: Path) -> Iterator[tuple[int, str | _Bad]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                yield number, _not_utf8(error)
                continue
            if line.strip():
                yield number, line


def _not_utf8(error: UnicodeDecodeError) -> _Bad:
    return _Bad("", f"is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8")


def _tsv_records(path: Path) -> Records:
    for number, line in _lines(path):
        if isinstance(line, _Bad):
            yield number, line
            continue
        fields = line.rstrip("\r\n").split("\t")
        if number == 1 and tuple(field.strip().lower() for field in fields) in _HEADERS:
            continue
        if len(fields) != 2:
            found = f"{len(fields)} field" + "s" * (len(fields) != 1)
            yield number, _Bad("", f"has {found} between tabs; a line is question TAB answer")
            continue
        yield number, {"question": fields[0], "answer": fields[1]}


_HEADERS = {("question", "answer"), ("prompt", "target")}


def _jsonl_records(path: Path) -> Records:
    for number, line in _lines(path):
        if not isinstance(line, _Bad):
            try:
                line = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                line = _Bad("", f"is no JSON: {error}")
        yield number, line


def _array_records(path: Path) -> Records:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield 1, _not_utf8(error)
        return
    decoder, at, line = json.JSONDecoder(), text.index("[") + 1, 1
    counted = 0
    while True:
        at = _GAP.match(text, at).end()
        line, counted = line + text.count("\n", counted, at), at
        if text[at : at + 1] == "]":
            return
        try:
            record, at = decoder.raw_decode(text, at)
        except (json.JSONDecodeError, RecursionError) as error:
            # Inside an array nothing says where the next record starts.
            yield line, _Bad("", f"is no JSON, and the rest of the array is lost with it: {error}")
            return
        yield line, record


_GAP = re.compile(r"[\s,]*")


def _hub_records(name: str) -> Records:
    dataset, _, split = name.partition(":")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", dataset):
        raise ValueError(f"{name!r} is no file here, nor a Hub dataset's name (owner/name:split).")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(
            f"There is no file {name}, and reading the Hub dataset of that name needs the package datasets: "
            "pip install datasets."
        ) from error
    try:
        loaded = load_dataset(dataset, split=split or None)
    except Exception as error:
        raise ValueError(f"No file {name} here, and no such dataset from the Hub: {error}.") from error
    if isinstance(loaded, dict):
        if len(loaded) > 1:
            splits = " or ".join(f"{dataset}:{split}" for split in loaded)
            raise ValueError(f"{name} has several splits; choose one of them: {splits}.")
        loaded = next(iter(loaded.values()))
    return ((row, dict(record)) for row, record in enumerate(loaded, 1))


# -- records into examples -------------------------------------------------------------------------


def _parse(record: Any, format: str) -> tuple[QAExample, str]:
    """The example, and the field whose target is already the answer ("" where it is not)."""
    if not isinstance(record, dict):
        raise _Bad("", f"is {_show(record)}; a record is a JSON object")
    if format in ("auto", "tsv"):
        format = next((name for name, keys in _SIGNS if any(key in record for key in keys)), "")
        if not format:
            fields = ", ".join(map(str, record)) or "(none)"
            raise _Bad("", f"has the fields {fields}, which are those of no known format")
    return _PARSERS[format](record)


_TRUE = ("answers", "ground_truth", "answer", "target_true")


def _own(record: dict[str, Any]) -> tuple[QAExample, str]:
    prompt = _required(record, "prompt", "question", "text")
    target = _required(record, "target", "target_new", "answer", "labels", "answers")
    answers = _texts(record, *_TRUE) or (target,)
    explicit = next((key for key in ("target", "target_new") if record.get(key) is not None), "")
    stated = any(record.get(key) is not None for key in _TRUE)
    locality = _pairs(record, "locality", answer_needed=False)
    if record.get("locality_prompt") is not None:
        prompts = _texts(record, "locality_prompt")
        answer = _texts(record, "locality_ground_truth")
        locality += tuple(itertools.zip_longest(prompts, answer[: len(prompts)]))
    example = QAExample(
        prompt=prompt,
        target=target,
        subject=_optional(record, "subject", "concept"),
        answers=answers,
        rephrasings=_others(prompt, _texts(record, *_REPHRASINGS)),
        locality=locality,
        portability=_pairs(record, "portability", answer_needed=True),
    )
    return example, explicit if stated and target in answers else ""


_REPHRASINGS = ("rephrasings", "rephrases", "rephrase", "rephrase_prompt")


def _kilt(record: dict[str, Any]) -> tuple[QAExample, str]:
    prompt, subject = _required(record, "input"), None
    meta = record.get("meta") or {}
    if not isinstance(meta, dict):
        raise _Bad("meta", f"is {_show(meta)}; it must be a JSON object")
    wordings = _texts(meta, "template_questions", prefix="meta.")
    if " [SEP] " in prompt:  # the plain KILT release: subject [SEP] relation, its questions beside it
        subject = prompt.partition(" [SEP] ")[0].strip()
        prompt, wordings = (wordings[0], wordings[1:]) if wordings else (prompt, ())
    output = record.get("output")
    if not isinstance(output, list):
        raise _Bad("output", f'is {_show(output)}; it must be a list of {{"answer": ...}}')
    given = [item["answer"] for item in output if isinstance(item, dict) and item.get("answer") is not None]
    answers = _texts({"output": given}, "output")
    alternatives = _texts(record, "alternatives")
    if not (answers or alternatives):
        raise _Bad("output", "has no answer")
    target = next((text for text in alternatives if text not in answers), (alternatives or answers)[0])
    # Where the filtered ones are given the others were found to change the meaning.
    kept = "filtered_rephrases" if "filtered_rephrases" in record else "rephrases"
    rephrasings = _others(prompt, _texts(record, kept) + wordings)
    example = QAExample(prompt, target, subject or _optional(record, "subject"), answers, rephrasings)
    return example, "alternatives" if alternatives and target in answers else ""


def _zsre(record: dict[str, Any]) -> tuple[QAExample, str]:
    prompt, target = _required(record, "src"), _required(record, "alt")
    answers = _texts(record, "answers")
    loc = _optional(record, "loc")
    example = QAExample(
        prompt=prompt,
        target=target,
        subject=_optional(record, "subject"),
        answers=answers,
        rephrasings=_others(prompt, _texts(record, "rephrase")),
        locality=((loc, _optional(record, "loc_ans")),) if loc else (),
        portability=_pairs(record, "portability", answer_needed=True),
    )
    return example, "alt" if target in answers else ""


def _counterfact(record: dict[str, Any]) -> tuple[QAExample, str]:
    rewrite = record.get("requested_rewrite")
    if not isinstance(rewrite, dict):
        raise _Bad("requested_rewrite", f"is {_show(rewrite)}; it must be a JSON object")
    prefix = "requested_rewrite."
    subject = _required(rewrite, "subject", prefix=prefix)
    prompt = _required(rewrite, "prompt", prefix=prefix)
    if "{}" not in prompt and subject not in prompt:
        raise _Bad(prefix + "prompt", f"is {prompt!r}; it must have {{}} where the subject goes")
    prompt = prompt.replace("{}", subject)
    target = _object(rewrite, "target_new", prefix)
    true = _object(rewrite, "target_true", prefix) if rewrite.get("target_true") is not None else None
    example = QAExample(
        prompt=prompt,
        target=target,
        subject=subject,
        answers=(true,) if true else (),
        rephrasings=_others(prompt, _texts(record, "paraphrase_prompts")),
        locality=tuple((text, true) for text in _texts(record, "neighborhood_prompts")),
    )
    return example, prefix + "target_new" if target == true else ""


_PARSERS: dict[str, Callable[[dict[str, Any]], tuple[QAExample, str]]] = {
    "jsonl": _own, "kilt": _kilt, "zsre": _zsre, "counterfact": _counterfact,
}  # fmt: skip
_SIGNS = (
    ("counterfact", ("requested_rewrite",)),
    ("zsre", ("src",)),
    ("kilt", ("input",)),
    ("jsonl", ("prompt", "question", "text")),
)


# -- fields ----------------------------------------------------------------------------------------


def _show(value: Any) -> str:
    if value is None:
        return "missing"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return f"{text[:37]}..." if len(text) > 40 else text


def _required(record: dict[str, Any], *names: str, prefix: str = "") -> str:
    texts = _texts(record, *names, prefix=prefix)
    if not texts:
        present = next((name for name in names if name in record), names[0])
        raise _Bad(prefix + present, "is empty" if present in record else "is missing")
    return texts[0]


def _optional(record: dict[str, Any], *names: str) -> str | None:
    return next(iter(_texts(record, *names)), None)


def _object(rewrite: dict[str, Any], name: str, prefix: str) -> str:
    value = rewrite.get(name)
    return _required({name: value.get("str") if isinstance(value, dict) else value}, name, prefix=prefix)


def _texts(record: dict[str, Any], *names: str, prefix: str = "") -> tuple[str, ...]:
    """The non-empty texts in the first field that is there: one text, or lists of them to any depth."""
    for name in names:
        if record.get(name) is not None:
            return tuple(text for text in _flat(record[name], prefix + name) if text)
    return ()


def _flat(value: Any, field: str) -> Iterator[str]:
    if isinstance(value, str):
        yield value.strip()
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item, field)
    else:
        raise _Bad(field, f"is or holds {_show(value)}; it must be text or a list of texts")


def _others(prompt: str, texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(text for text in dict.fromkeys(texts) if text != prompt)


def _pairs(record: dict[str, Any], name: str, *, answer_needed: bool) -> tuple[tuple[str, Any], ...]:
    """(prompt, answer) pairs: a list of objects, pairs or texts, one object, or such lists in groups."""
    return tuple(pair for pair in _pairs_in(record.get(name), name) if pair[1] or not answer_needed)


def _pairs_in(value: Any, field: str) -> Iterator[tuple[str, str | None]]:
    if value is None:
        return
    if isinstance(value, str):
        yield value.strip(), None
    elif isinstance(value, dict):
        prompt = _optional(value, *_PAIR_PROMPTS)
        if prompt is not None:
            yield prompt, _optional(value, *_PAIR_ANSWERS)
        else:
            for group, items in value.items():
                yield from _pairs_in(items, f"{field}.{group}")
    elif isinstance(value, (list, tuple)):
        for item in value:
            if isinstance(item, (list, tuple)) and item and isinstance(item[0], str) and len(item) <= 2:
                yield item[0].strip(), next(iter(_flat(list(item[1:]), field)), None) if item[-1] else None
            else:
                yield from _pairs_in(item, field)
    else:
        raise _Bad(field, f"is or holds {_show(value)}; it must be pairs of prompt and answer")


_PAIR_PROMPTS = ("prompt", "question", "New Question")
_PAIR_ANSWERS = ("answer", "target", "ground_truth", "New Answer")
