"""``mendfast inspect``: what files and directories hold, without the model that they are of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from ..schema import check_fields, some
from .console import make_console, text
from .failures import EXPECTED, sentence
from .holdings import holdings
from .sources import shown_bytes

SHOWN = 20  # requests of a file that are listed, and weights


@dataclass(kw_only=True)
class InspectSettings:
    """What ``mendfast inspect`` is asked."""

    files: list[str] = field(metadata={"help": "files and directories", "metavar": "FILE", "positional": True})

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.files:
            raise ValueError("There is nothing to inspect; name a file or a directory.")


def inspect(settings: InspectSettings) -> dict[str, Any]:
    """Print what each holds.

    Raises:
        ValueError: some could not be read; what the others hold is printed all the same.
    """
    console, found, wrong = make_console(), [], []
    for path in settings.files:
        try:
            found.append(holdings(path))
        except EXPECTED as error:
            if len(settings.files) == 1:
                raise
            wrong.append(sentence(error))
            continue
        _print(found[-1], console)
    if wrong:
        more = f" (and {len(wrong) - 1} more like it: {some(wrong[1:], 2)})" if len(wrong) > 1 else ""
        raise ValueError(f"{len(wrong)} of {len(settings.files)} can't be read. {wrong[0]}{more}")
    return {"files": found}


def _print(holding: dict[str, Any], console: Console) -> None:
    table = Table(show_header=False, title=text((holding["path"], "bold")), title_justify="left", expand=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    version = f", format {holding['format_version']}" if holding.get("format_version") else ""
    table.add_row("holds", text((holding["kind"], "bold"), version))
    base = holding["base"]
    if any(base.values()):
        known = [base["name"] or "a model without a name", f"({base['model_type'] or 'of unknown type'})"]
        known += [f"fingerprint {base['fingerprint']}"] if base["fingerprint"] else ["no fingerprint"]
        table.add_row("made for", text(" ".join(known)))
    for name, value in holding["details"].items():
        table.add_row(text(name.replace("_", " ")), text(_shown(value)))
    if weights := holding["weights"]:
        lines = [_weight(name, **known) for name, known in list(weights.items())[:SHOWN]]
        lines += [f"and {len(weights) - SHOWN:,} more"] if len(weights) > SHOWN else []
        table.add_row(f"{len(weights):,} weight{'' if len(weights) == 1 else 's'}", text("\n".join(lines)))
    if (requests := holding["requests"]) is not None:
        lines = [f"{prompt} -> {target}" for prompt, target in requests[:SHOWN]]
        lines += [f"and {len(requests) - SHOWN:,} more"] if len(requests) > SHOWN else []
        table.add_row(f"{len(requests):,} request{'' if len(requests) == 1 else 's'}", text("\n".join(lines)))
    table.add_row("size", text(shown_bytes(holding["bytes"])))
    console.print(table)


def _weight(name: str, inputs: int | None = None, outputs: int | None = None, rows: int | None = None) -> str:
    sizes = " x ".join(f"{size:,}" for size in (inputs, outputs) if size is not None)
    said = [sizes] if sizes else []
    said += [f"rank {rows:,} at most"] if rows is not None else []
    return f"{name}: {', '.join(said)}" if said else name


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(part)}" for name, part in value.items())
    return some(map(str, value), 8) if isinstance(value, (list, tuple)) else str(value)
