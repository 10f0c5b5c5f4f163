"""Edits by the files that a command was given, and the model that they are of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from .. import pretrained
from ..adapters.peft import CONFIG_FILE
from ..config import MendConfig
from ..edit import Edit
from ..editable import EditableModel
from ..files import read_shapes
from ..fingerprint import Fingerprint
from ..memory_file import read_requests
from ..metrics import correct
from ..schema import some
from .loading import LoadSettings, load_model, shipped_for

MEASURED = 256  # requests that the model is asked, at most
_ASKED_AT_ONCE = 16


@dataclass(kw_only=True)
class SourceSettings(LoadSettings):
    """A base model, and files of edits that were made for it."""

    edit: list[str] = field(
        default_factory=list,
        metadata={"help": "edits, as mendfast edit --out saves them, or PEFT adapters of edits", "metavar": "FILE"},
    )
    memory: str | None = field(
        default=None, metadata={"help": "a memory, as mendfast edit --memory keeps it", "metavar": "FILE"}
    )
    editor: str | None = field(
        default=None,
        metadata={
            "help": "editor that made --memory, or that says how the requests of --edit are put; default: the demo's, "
            "or what ships for --model"
        },
    )
    strict: bool = field(
        default=False, metadata={"help": "refuse, and not only warn of, edits made for a model with other weights"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.editor is not None and self.model is None:
            raise ValueError("--editor serves one model; pass that too, as --model, or neither: the demo's.")
        if repeated := sorted({path for path in self.edit if self.edit.count(path) > 1}):
            raise ValueError(f"--edit names {some(repeated)} more than once; an edit is taken once.")
        for path in self.edit:
            _check_edit(path)
        if self.memory is not None:
            if not read_requests(self.memory) and not self.edit:
                raise ValueError(f"{self.memory} holds no edits; there is nothing to do.")


class Sources(NamedTuple):
    """What the files hold, on the model that they are of."""

    subject: EditableModel  # the model as one can ask it; the editor, where there is one
    edits: dict[str, Edit]  # by file

    @property
    def requests(self) -> list[tuple[str, str]]:
        return [request for edit in self.edits.values() for request in edit.requests]


def _check_edit(path: str) -> None:
    place = Path(path)
    if place.is_dir():
        if not (place / CONFIG_FILE).is_file():
            raise ValueError(f"{path} is a directory without {CONFIG_FILE}: no PEFT adapter. Name an edit's file.")
    elif place.is_file() and read_kind(place) == "memory":
        raise ValueError(f"{path} holds a memory; pass it as --memory {path}.")
    else:
        read_shapes(path, "edit")


def read_kind(path: Path) -> str | None:
    """What a safetensors file says that it is: "edit", "memory", ...; None of another program's file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get("format", "")
    except (SafetensorError, OSError, KeyError, AttributeError, RuntimeError, OverflowError):
        return None
    return found.removeprefix("mendfast.") if found.startswith("mendfast.") else None


def load_sources(settings: SourceSettings, base: Fingerprint | None = None) -> Sources:
    """The edits, whose files are read before the model is, and the model.

    Args:
        base: of the model as it was before the edits that it came with; edits made for that are for this one too.
    """
    from ..editor import MendEditor

    read = {path: Edit.load(path) for path in settings.edit if not Path(path).is_dir()}
    subject: EditableModel | None = None
    if settings.model is None:
        from ..demo import build

        subject = build.load()
        model, tokenizer = subject.model, subject.tokenizer
    else:
        model, tokenizer = load_model(settings)
        if (name := settings.editor or shipped_for(model)) is not None:
            subject = MendEditor.from_pretrained(name, model, tokenizer, strict=settings.strict)
        elif settings.memory is not None:
            raise ValueError(
                f"{settings.memory} is solved by the editor that made it, and none ships for this model; name it with "
                "--editor."
            )
    edits = {path: read[path] if path in read else Edit.from_peft(path, model) for path in settings.edit}
    if settings.memory is not None:
        from ..memory import EditMemory

        edits[settings.memory] = EditMemory.load(settings.memory, subject).edit()
    names: dict[str, None] = {}
    for path, edit in edits.items():
        if base is not None and edit.fingerprint is not None and _agree(base, edit.fingerprint):
            edit.fingerprint = None  # what is different in the model's weights is known
        try:
            names |= {layer.name: None for layer in edit.layers_of(model, settings.strict)}
        except (ValueError, TypeError) as error:
            raise type(error)(f"{path}: {error}") from error
    if subject is None:
        subject = EditableModel(model, tokenizer, MendConfig(layers=list(names) or None))
    return Sources(subject, edits)


def _agree(one: Fingerprint, other: Fingerprint) -> bool:
    common = one.samples.keys() & other.samples.keys()
    return bool(common) and all(torch.equal(one.samples[n].values, other.samples[n].values) for n in common)


def success(subject: EditableModel, requests: Sequence[tuple[str, str]]) -> float | None:
    """The share of the first requests whose target the model, as it is now, answers; None where it can't be asked."""
    asked = [tuple(request) for request in requests[:MEASURED]]
    if not asked or subject.tokenizer is None:
        return None
    try:
        return correct(subject, asked, _ASKED_AT_ONCE).float().mean().item()
    except (ValueError, TypeError):  # of a model that has no such label, or a shorter context
        return None


def name_of(settings: LoadSettings) -> str:
    """What a model is called, without the folders that it lies in."""
    if settings.model is None:
        return "the demo's model"
    source = pretrained.resolve(settings.model)
    return source.short or (Path(str(source)).resolve().name if source.local or source.gguf else source.place)


def in_words(before: float | None, after: float | None, count: int) -> str:
    """Edit success before and after, in a sentence; "" where it was not measured."""
    if before is None or after is None:
        return ""
    asked = min(count, MEASURED)
    return f"Of {asked:,} request{'' if asked == 1 else 's'} the model answers {before:.0%} before, {after:.0%} after."


def shown_bytes(count: float) -> str:
    """A size that people read."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1000
    raise AssertionError
