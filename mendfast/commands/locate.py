"""``mendfast locate``: which blocks of a model to edit, measured before an editor is trained for them."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from ..editable import EditableModel
from ..files import atomic_write, read_json_bytes
from ..locate import Case, Measured, candidates, locate
from ..own_words import own_words
from ..schema import check_object, is_text, parse_json, shown
from ..tasks.load import load_task
from ..tasks.task import FactTask
from ..training.data import FactSampler, Pair
from .console import make_console, plain, text
from .evaluate import tell
from .loading import LoadSettings, load_model
from .outputs import check_file

PROTECTED, UNRELATED, OWN = 48, 16, 32  # questions protected, asked about, and texts of the model's own
DEFAULT_OUT = "mendfast-layers.json"


@dataclass(kw_only=True)
class LocateSettings(LoadSettings):
    """What ``mendfast locate`` is asked."""

    data: str = field(default="world:train", metadata={"help": "facts to edit: a file or Hub name, or world:train"})
    span: int = field(default=3, metadata={"help": "consecutive blocks that are edited together", "least": 1})
    stride: int | None = field(
        default=None, metadata={"help": "blocks from one candidate to the next; default: --span", "least": 1}
    )
    edits: int = field(default=6, metadata={"help": "edits that each candidate is measured with", "least": 1})
    seed: int = field(default=0, metadata={"help": "of the facts that are drawn", "least": 0})
    out: str = field(
        default=DEFAULT_OUT,
        metadata={"help": "where the choice goes, for train --layers-from; beside it a plot", "metavar": "JSON"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.out.endswith(".json"):
            raise ValueError(f"--out is {shown(self.out)}; name a file that ends in .json.")
        check_file("--out", self.out)


def locate_blocks(settings: LocateSettings) -> dict[str, Any]:
    """Measure, print the table, write the choice and the plot.

    Raises:
        ValueError: data without facts in several wordings, a model without blocks to edit.
    """
    console = make_console()
    model, tokenizer = load_model(settings)
    subject = EditableModel(model, tokenizer)
    task = load_task("qa", settings.data, seed=settings.seed)
    assert isinstance(task, FactTask)
    tell([*task.problems, *task.sieve(subject)], console)
    cases, protected, unrelated = _drawn(task, settings)
    texts: list[Any] = list(protected)
    if subject.kind == "causal":
        texts += own_words(model, tokenizer, samples=OWN, max_new_tokens=32, chat=subject.chat, progress=None)
    among = candidates(model, settings.span, settings.stride)
    found = locate(model, tokenizer, cases, texts, unrelated, among=among)
    best, last = min(found, key=lambda measured: measured.loss), found[-1]
    console.print(_table(found, best))
    out = Path(settings.out)
    result = {
        "layers": best.layers,
        "blocks": best.blocks,
        "last_blocks": last.blocks,
        "candidates": [measured.to_dict() for measured in found],
    }
    atomic_write(out, json.dumps(result, indent=2).encode() + b"\n")
    atomic_write(out.with_suffix(".png"), plot(found, best))
    name = settings.model or "MODEL"
    console.print(
        plain(
            f"Blocks {best.blocks} do best here. Train an editor for them with\n"
            f"  mendfast train --model {name} --layers-from {out} --output DIR\n"
            f"Plot: {out.with_suffix('.png')}"
        )
    )
    return result


def layers_from(path: str) -> list[str]:
    """The layers that ``mendfast locate`` wrote to a file.

    Raises:
        ValueError, FileNotFoundError: no such file, or not of that kind.
    """
    layers = check_object(parse_json(read_json_bytes(path), path), path).get("layers")
    if not isinstance(layers, list) or not layers or not all(isinstance(n, str) and is_text(n) for n in layers):
        raise ValueError(f'{path} has no list of layer names under "layers"; mendfast locate writes such files.')
    return layers


def _drawn(task: FactTask, settings: LocateSettings) -> tuple[list[Case], list[Pair], list[Pair]]:
    """Edits, questions to protect, and others to ask: of different facts."""
    items = [item for item in task.items if len(item.wordings) > 1]
    if len(items) < settings.edits:
        raise ValueError(
            f"{settings.data} has {len(items)} facts in more than one wording, and --edits asks for {settings.edits}; "
            "take fewer, or leave --data out for the facts that come with the package."
        )
    draw = FactSampler(items, neighbours=task.items, loc=0, include_inner=0.0, seed=settings.seed).draw(
        0, settings.edits
    )
    cases = [Case(*inner, outer[0]) for inner, outer in zip(draw.inner, draw.outer, strict=True)]
    asked = {pair[0] for pair in draw.inner}
    others = [item for item in task.items if not asked & set(item.wordings)]
    random.Random(settings.seed).shuffle(others)
    pairs = [(item.wordings[0], item.answer) for item in others[: PROTECTED + UNRELATED]]
    if len(pairs) < 2:
        raise ValueError(f"{settings.data} has no facts beside those that are edited; pass more of them.")
    half = min(UNRELATED, len(pairs) // 2)
    return cases, pairs[half:], pairs[:half]


def _table(found: Sequence[Measured], best: Measured) -> Table:
    table = Table(title="Untrained edits of equal strength, by blocks", title_justify="left")
    for column in ("blocks", "gradient", "step", "reached", "generality", "KL elsewhere", "loss"):
        table.add_column(column, justify="left" if column == "blocks" else "right")
    for one in found:
        mark = "bold" if one is best else ""
        table.add_row(
            text((one.blocks + (" <" if one is best else ""), mark)), f"{one.energy:.1e}", f"{one.step_size:.0e}",
            f"{one.reached:.2f}", f"{one.generality:.2f}", f"{one.kl:.3f}", f"{one.loss:.2f}",
        )  # fmt: skip
    return table


def plot(found: Sequence[Measured], best: Measured) -> bytes:
    """The rephrased question's loss and the disturbance, stacked, by blocks: PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.6 + 0.7 * max(4, len(found)), 3.4), layout="constrained")
    axis = figure.subplots()
    places = range(len(found))
    nll, kl = [one.rephrased_nll for one in found], [one.kl for one in found]
    axis.bar(places, nll, label="loss of the question reworded")
    axis.bar(places, kl, bottom=nll, label="KL of other answers")
    axis.set_xticks(places, [one.blocks for one in found], rotation=30, ha="right")
    axis.set(ylabel="nats a token", xlabel="blocks edited")
    chosen = found.index(best)
    axis.annotate("chosen", (chosen, nll[chosen] + kl[chosen]), ha="center", va="bottom")
    axis.margins(y=0.12)
    axis.legend(fontsize="small")
    axis.grid(alpha=0.3, axis="y")
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    return stream.getvalue()
