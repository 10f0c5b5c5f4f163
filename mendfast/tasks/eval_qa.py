"""``mendfast eval``: edit success, generality and drawdown of an editor, and of what it is compared with."""

from __future__ import annotations

import argparse
import random
import time
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..baselines import FineTuning
from ..editor import MendEditor
from ..metrics import Scorer
from .train_qa import read_examples

NAMES = {"mend": "MEND", "identity": "untrained editor", "fine_tuning": "fine-tuning"}


def evaluate(editor: MendEditor, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the command does: one edit per example, its rephrasings, and known questions that must stay."""
    console = Console()
    unknown = [name for name in arguments.systems if name not in NAMES]
    if unknown:
        raise ValueError(f"System {unknown[0]!r} is unknown; choose from {', '.join(NAMES)}.")
    examples = read_examples(arguments.data, arguments.limit, console)
    known = None
    if arguments.known:
        known = [(e.prompt, e.target) for e in read_examples(arguments.known, None, console)]
    results: dict[str, Any] = {}
    table = Table(title=f"{len(examples)} edits, one at a time")
    for column in ("system", "edit success", "generality", "drawdown", "ms per edit"):
        table.add_column(column, justify="left" if column == "system" else "right")
    for system in arguments.systems:
        scorer, rng, spent = Scorer(), random.Random(0), 0.0
        subject = editor.untrained() if system == "identity" else editor
        tuning = FineTuning(editor, arguments.fine_tuning_rate)
        for example in track(examples, NAMES[system], console=console, transient=True):
            request = [(example.prompt, example.target)]
            others = known and rng.sample(known, min(arguments.unrelated, len(known)))
            others = others or [(p, t) for p, t in example.locality if t]
            started = time.perf_counter()
            tuned = system == "fine_tuning"
            context = tuning.edited(request) if tuned else subject.edit(request).attached(editor.model)
            seconds = time.perf_counter() - started
            scorer.add(subject, context, request, [(r, example.target) for r in example.rephrasings], others)
            spent += tuning.seconds if tuned else seconds
        score = scorer.score()
        results[system] = score.to_dict() | {"ms_per_edit": 1e3 * spent / len(examples)}
        table.add_row(
            NAMES[system],
            *(f"{value:.3f}" for value in (score.edit_success, score.generality, score.drawdown)),
            f"{results[system]['ms_per_edit']:.1f}",
        )
    console.print(table)
    return results
