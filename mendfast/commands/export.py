"""``mendfast export``: edits as an adapter of PEFT or llama.cpp, or as one file, and what truncation costs."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..adapters.lora import Lora, lora_of
from ..edit import Edit
from .console import make_console, plain, text
from .outputs import check_new_directory, check_new_file
from .sources import MEASURED, SourceSettings, load_sources, success

FORMATS = {"peft": "", "gguf-lora": ".gguf", "safetensors": ".safetensors"}
"""Each with the ending of the file that it is; an adapter of PEFT is a directory."""


@dataclass(kw_only=True)
class ExportSettings(SourceSettings):
    """What ``mendfast export`` is asked."""

    format: str = field(
        metadata={
            "help": "peft: a LoRA adapter, for vLLM too; gguf-lora: the same for llama.cpp; safetensors: one file of "
            "all the edits, for mendfast",
            "choices": tuple(FORMATS),
        }
    )
    output: str = field(
        metadata={
            "help": "a new directory; of gguf-lora and safetensors also a FILE.gguf or FILE.safetensors",
            "metavar": "DIR",
        }
    )
    rank: int | None = field(
        default=None,
        metadata={"help": "keep so many directions of each weight's update, the strongest; default: all", "least": 1},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.edit and self.memory is None:
            raise ValueError("There is nothing to export: pass --edit FILE, or --memory FILE.")
        if self.format == "gguf-lora" and find_spec("gguf") is None:
            raise ValueError("--format gguf-lora needs the package gguf: pip install 'mendfast[gguf]'")
        ending = Path(self.output).suffix
        if ending in FORMATS.values() and ending and ending != FORMATS[self.format]:
            raise ValueError(f"--output is {self.output}, and --format {self.format} writes no {ending} file.")
        if self.format == "peft" or not ending or ending != FORMATS[self.format]:
            check_new_directory("--output", self.output)
        else:
            check_new_file("--output", self.output)

    @property
    def place(self) -> Path:
        """The file that is written; of peft the directory."""
        path, ending = Path(self.output), FORMATS[self.format]
        if not ending or path.suffix == ending:
            return path
        return path / f"{'adapter' if self.format == 'gguf-lora' else 'edit'}{ending}"


def export(settings: ExportSettings) -> dict[str, Any]:
    """Write the edits in the format; returns what it is, and what it lacks."""
    console = make_console()
    found = load_sources(settings)
    edits, subject = list(found.edits.values()), found.subject
    edit = edits[0] if len(edits) == 1 else Edit.sum(edits)
    lora = lora_of(edit, subject.model, settings.rank)
    written = edit if settings.rank is None else edit_of(lora, edit)
    figures: dict[str, Any] = {
        "format": settings.format, "path": str(settings.place), "rank": lora.rank, "errors": lora.errors,
        "edit_success": _successes(subject, edit, written),
    }  # fmt: skip
    _tell_cost(settings, lora, figures["edit_success"], len(edit.requests), console)
    if settings.format == "peft":
        made = edit.export_peft(settings.place, subject.model, settings.rank)
        figures |= {"r": made.r, "digest": made.digest, "lora_name": made.lora_name, "notes": made.notes}
        lines = [
            f"wrote {made.path}, of rank {made.r}: PeftModel.from_pretrained(model, {str(made.path)!r})",
            f"vllm serve {settings.model or 'MODEL'} --enable-lora --max-lora-rank {made.r} "
            f"--lora-modules {made.lora_name}={made.path}",
        ]
    elif settings.format == "gguf-lora":
        from ..adapters.gguf import export_gguf_lora

        adapter = export_gguf_lora(edit, settings.place, subject.model, settings.rank)
        figures["names"] = adapter.names
        lines = [
            f"wrote {adapter.path}, an adapter of rank {adapter.rank}",
            f"llama-cli -m MODEL.gguf --lora {adapter.path}",
        ]
    else:
        written.save(settings.place)
        lines = [f"wrote {settings.place} ({written.num_bytes():,} bytes)"]
    for line in lines:
        console.print(text(line), soft_wrap=True)
    return figures


def edit_of(lora: Lora, edit: Edit) -> Edit:
    """The edit that the matrices of an adapter are."""
    factors = {f"{path}.weight": (a, b.T.contiguous(), -1.0) for path, (a, b) in lora.matrices.items()}
    return Edit(factors, edit.model_type, edit.requests, edit.fingerprint)


def _successes(subject: Any, edit: Edit, written: Edit) -> dict[str, float | None]:
    """Of the model without the edit, with it, and with what is left of it."""
    found = {"before": success(subject, edit.requests)}
    for name, one in (("edit", edit), ("exported", written)):
        if one is edit and name == "exported":
            found[name] = found["edit"]
            continue
        with one.attached(subject.model):
            found[name] = success(subject, edit.requests)
    return found


def _tell_cost(
    settings: ExportSettings, lora: Lora, successes: dict[str, float | None], requests: int, console: Console
) -> None:
    if any(lora.errors.values()):
        table = Table(title=text(f"truncated to rank {lora.rank}"))
        table.add_column("weight")
        table.add_column("relative error", justify="right")
        for name, error in lora.errors.items():
            table.add_row(plain(name), plain(f"{error:.2%}"))
        console.print(table)
    elif settings.rank is not None:
        console.print(f"Rank {settings.rank} holds the whole edit: nothing is truncated.")
    if successes["edit"] is not None:
        asked = min(requests, MEASURED)
        shares = f"{successes['before']:.0%} without the edit, {successes['edit']:.0%} with it"
        if settings.rank is not None:
            shares += f", {successes['exported']:.0%} with what is exported"
        console.print(text(f"Edit success on {asked:,} request{'' if asked == 1 else 's'}: {shares}"))
