"""``mendfast apply``: a model with edits in its weights, saved as from_pretrained loads it; or taken out of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .. import pretrained
from ..fingerprint import fingerprint_of
from ..layers import check_untied, check_writable, named_layers
from ..ledger import backups_of
from ..schema import some
from . import edited_model
from .console import make_console, text
from .loading import load_model
from .outputs import check_new_directory
from .sources import Sources, SourceSettings, in_words, load_sources, name_of, shown_bytes, success

LOST = 0.01  # of an update's norm that rounding may take unsaid


@dataclass(kw_only=True)
class ApplySettings(SourceSettings):
    """What ``mendfast apply`` is asked."""

    save_model: str = field(
        metadata={"help": "a new directory for the edited model, its tokenizer and what was edited", "metavar": "DIR"}
    )
    take_back: bool = field(
        default=False, metadata={"help": "take all edits out of --model, which this command has saved, bit for bit"}
    )
    no_originals: bool = field(
        default=False,
        metadata={"help": "do not keep the edited weights as they were; --take-back is impossible then"},
    )
    rounding: str = field(
        default="nearest",
        metadata={
            "help": "of 16-bit weights; stochastic keeps what is smaller than half a unit in their last place",
            "choices": ("nearest", "stochastic"),
        },
    )
    seed: int = field(default=0, metadata={"help": "of stochastic rounding", "least": 0, "most": 2**63 - 1})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantize:
            raise ValueError(
                "--quantize packs the weights, so that no edit can be written into them; leave it out, and quantise "
                "the edited model."
            )
        if self.take_back:
            self._check_take_back()
        elif not self.edit and self.memory is None:
            raise ValueError("There is nothing to apply: pass --edit FILE, or --memory FILE; or --take-back.")
        check_new_directory("--save-model", self.save_model)

    def _check_take_back(self) -> None:
        if self.edit or self.memory is not None or self.editor is not None:
            raise ValueError("--take-back takes all edits out; leave out --edit, --memory and --editor.")
        if self.no_originals:
            raise ValueError("--no-originals is of edits that are applied, and --take-back takes them out; pass one.")
        directory = _directory(self)
        if directory is None or edited_model.read_record(directory) is None:
            raise ValueError(
                f"--take-back needs --model DIR, a model that mendfast apply has saved: with "
                f"{edited_model.EDITS_FILE} in it."
            )


def _directory(settings: ApplySettings) -> Path | None:
    """Where the model is, if that is a directory and no GGUF file."""
    source = pretrained.resolve(settings.model) if settings.model is not None else None
    return Path(source.place) if source is not None and source.local and not source.gguf else None


def apply(settings: ApplySettings) -> dict[str, Any]:
    """Write the edits into the weights and save the model, or take them out and save it."""
    console = make_console()
    if settings.take_back:
        return _take_back(settings, console)
    source, directory = pretrained.resolve(settings.model) if settings.model is not None else None, _directory(settings)
    earlier = edited_model.read_record(directory) if directory else None
    found = load_sources(settings, edited_model.base_of(earlier, str(directory)))
    model, subject, requests = found.subject.model, found.subject, found.requests
    described = [
        edited_model.describe(path, edit, "memory" if path == settings.memory else "edit")
        for path, edit in found.edits.items()
    ]
    _check_new(described, earlier, settings)
    names = list(dict.fromkeys(name for edit in found.edits.values() for name in edit.factors))
    layers = named_layers(model, names)
    for layer in layers:
        check_writable(layer)
    check_untied(model, layers)
    edited_model.check_room(settings.save_model, model)
    base = earlier["base"] if earlier else {"model": name_of(settings), "revision": settings.revision}
    base |= {} if earlier else {"model_type": model.config.model_type}
    taken = fingerprint_of(model, layers)
    before = success(subject, requests)
    for edit in found.edits.values():
        edit.apply_(model, rounding=settings.rounding, seed=settings.seed)
    after = success(subject, requests)
    dtype = str(layers[0].weight.dtype).removeprefix("torch.")
    lost = _lost(found) if layers[0].weight.dtype.itemsize < 4 else 0.0
    originals = None if settings.no_originals else _originals(found, earlier, directory)
    listed = [*(earlier["edits"] if earlier else []), *described]
    record = edited_model.make_record(base, taken, listed, dtype)
    if earlier:
        record["base"]["fingerprint"] = earlier["base"].get("fingerprint")
    edited_model.save(
        settings.save_model, model, subject.tokenizer, source, revision=settings.revision, record=record,
        originals=originals,
    )  # fmt: skip
    if said := in_words(before, after, len(requests)):
        console.print(text(said))
    if lost > LOST:
        console.print(text((_said_lost(lost, dtype, settings), "yellow")))
    size = sum(file.stat().st_size for file in Path(settings.save_model).rglob("*") if file.is_file())
    console.print(text(f"saved {settings.save_model} ({shown_bytes(size)}), with {len(listed)} edits in its weights"))
    return {
        "model": settings.save_model, "bytes": size, "edits": listed, "before": before, "after": after,
        "lost_to_rounding": lost,
    }  # fmt: skip


def _check_new(described: list[dict[str, Any]], earlier: dict[str, Any] | None, settings: ApplySettings) -> None:
    there = {edit["sha256"]: edit["file"] for edit in (earlier["edits"] if earlier else ())}
    for edit in described:
        if edit["sha256"] in there:
            raise ValueError(
                f"{settings.model} holds the edit of {edit['file']} already, as {there[edit['sha256']]}; it would "
                "count twice."
            )
        there[edit["sha256"]] = edit["file"]


def _lost(found: Sources) -> float:
    """The largest share of an update that rounding took."""
    model = found.subject.model
    shares = [share for edit in found.edits.values() for share in edit.fidelity(model).values()]
    return max(shares, default=0.0)


def _said_lost(lost: float, dtype: str, settings: ApplySettings) -> str:
    ways = [] if settings.rounding == "stochastic" else ["--rounding stochastic"]
    ways += ["--dtype float32"] if dtype != "float32" else []
    way = f"; {' or '.join(ways)} keeps more" if ways else ""
    return f"Rounding to {dtype} took {lost:.1%} of an update{way}."


def _originals(found: Sources, earlier: dict[str, Any] | None, directory: Path | None) -> dict[str, torch.Tensor]:
    """The weights as they were before any edit; without those of which an earlier apply has kept nothing."""
    kept = edited_model.read_originals(directory) if directory else {}
    edited = {name for edit in (earlier["edits"] if earlier else ()) for name in edit["weights"]}
    backups = backups_of(found.subject.model)
    return {**{name: w for name, w in backups.items() if w is not None and name not in edited}, **kept}


def _take_back(settings: ApplySettings, console: Console) -> dict[str, Any]:
    source = pretrained.resolve(settings.model or "")
    record = edited_model.read_record(source.place) or {}  # settings saw to it that there is one
    originals = edited_model.read_originals(source.place)
    edited_model.check_complete(record, originals, str(settings.model))
    model, tokenizer = load_model(settings)
    edited_model.check_room(settings.save_model, model)
    edited_model.put_back(model, originals, str(settings.model))
    edited_model.save(settings.save_model, model, tokenizer, source)
    files = some(edit["file"] for edit in record["edits"])
    console.print(text(f"saved {settings.save_model}, {record['base'].get('model')} without {files}, bit for bit"))
    return {"model": settings.save_model, "taken_back": record["edits"]}
