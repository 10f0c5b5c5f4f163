"""``mendfast demo``: edits of facts that no editor has seen, before and after, and taken back."""

from __future__ import annotations

import hashlib
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from .. import editors, pretrained
from ..answers import can_match, exact_match, whole_words
from ..baselines import FineTuning
from ..demo import build
from ..editor import MendEditor
from ..generation import Answer, agreed, follow, generate_answers
from ..metrics import Score, Scorer
from ..schema import check_fields, shown
from ..tasks import world
from .console import make_console, text
from .outputs import check_directory, check_file

DOZEN, FULL_EDITS, UNRELATED = 12, 220, 64
SIMULTANEOUS = (1, 5, 25, 75, 125)
FINE_TUNING_RATE = 3e-3  # of 3e-4, 1e-3 and 3e-3 the one whose generality is best
FIGURES = ("edit_success", "generality", "drawdown")
SEED = 7
REAL = "smollm2-135m-instruct"
LONGEST = 32  # tokens of an answer
DOZEN_SEED = 6  # a dozen that spans eleven relations


@dataclass(kw_only=True)
class DemoSettings:
    """What ``mendfast demo`` is asked."""

    full: bool = field(default=False, metadata={"help": "add figures over 220 edits, and simultaneous edits"})
    plot: str = field(
        default="mendfast-demo.png", metadata={"help": "where --full draws its plot", "metavar": "PNG"}
    )
    real: bool = field(
        default=False, metadata={"help": "edit SmolLM2-135M-Instruct instead, which answers in its own words"}
    )
    retrain: bool = field(default=False, metadata={"help": "make the model and the editor anew (an hour)"})
    assets: str | None = field(
        default=None, metadata={"help": "where model and editor are; default: in the package", "metavar": "DIR"}
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.real and (self.full or self.retrain or self.assets):
            raise ValueError("--real has a model and an editor of its own; leave --full, --retrain and --assets out.")
        if self.full:
            check_file("--plot", self.plot)
            if not self.plot.lower().endswith(".png"):
                raise ValueError(f"--plot is {shown(self.plot)}; name a file that ends in .png.")
        if self.retrain:
            check_directory("--assets", self.assets or str(build.ASSETS))


def demo(settings: DemoSettings) -> dict[str, Any]:
    """What the command does; returns the figures."""
    if settings.real:
        return run_real(make_console())
    assets = Path(settings.assets) if settings.assets else build.ASSETS
    if settings.retrain:
        build.retrain(assets)
    plot = settings.plot if settings.full else None
    return run(full=settings.full, assets=assets, plot=plot, console=make_console())


class Case(NamedTuple):
    """One edit of a held-out fact, and what to ask afterwards."""

    question: str
    target: str
    paraphrase: str  # in the wording that no editor was trained on
    fact: world.Fact


def cases(count: int, seed: int = SEED) -> list[Case]:
    """Edits of distinct held-out facts, each to another answer of its relation."""
    rng = random.Random(seed)
    _, held_out = world.splits()
    chosen = rng.sample(held_out, count)
    result = []
    for fact in chosen:
        target = rng.choice([a for a in world.answers(fact.relation) if a != fact.answer])
        wording = rng.choice(world.train_wordings(fact.relation))
        paraphrase = world.held_out_wording(fact.relation).format(fact.entity)
        result.append(Case(wording.format(fact.entity), target, paraphrase, fact))
    return result


def unrelated(avoid: Sequence[world.Fact], count: int, rng: random.Random) -> list[tuple[str, str]]:
    """Questions about other facts, whose answers must stay."""
    taken = {(fact.entity, fact.relation) for fact in avoid}
    pool = [fact for fact in world.load_facts() if (fact.entity, fact.relation) not in taken]
    return [
        (world.question(fact, rng.randrange(len(world.RELATIONS[fact.relation].wordings))), fact.answer)
        for fact in rng.sample(pool, count)
    ]


def bits(model: torch.nn.Module) -> str:
    """A digest of every weight."""
    digest, seen = hashlib.sha256(), set()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and place not in seen:  # of tied weights once
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
        seen.add(place)
    return digest.hexdigest()


def measure(
    editor: MendEditor, groups: Sequence[Sequence[Case]], system: str, console: Console, *, count: int = UNRELATED
) -> Score:
    """Score ``system`` ("mend" or "fine_tuning") on groups of simultaneous edits."""
    scorer, rng = Scorer(), random.Random(SEED)
    tuning = FineTuning(editor, FINE_TUNING_RATE)
    label = f"{system}, {len(groups[0])} at once"
    for group in track(groups, label, console=console, transient=True, disable=not console.is_terminal):
        requests = [(case.question, case.target) for case in group]
        context = tuning.edit(requests) if system == "fine_tuning" else editor.edit(requests).attached(editor.model)
        others = unrelated([case.fact for case in group], count, rng)
        scorer.add(editor, context, requests, [(case.paraphrase, case.target) for case in group], others)
    return scorer.score()


def _groups(chosen: Sequence[Case], size: int, most: int) -> Iterator[Sequence[Case]]:
    for start in range(0, min(len(chosen) - size + 1, most * size), size):
        yield chosen[start : start + size]


def run(
    *, full: bool = False, assets: str | Path = build.ASSETS, plot: str | Path | None = None, console: Console
) -> dict[str, Any]:
    """Show the demo on ``console``; returns the figures."""
    started = time.perf_counter()
    editor = build.load(assets)
    model = editor.model
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"A GPT-2-shaped model of {parameters / 1e6:.1f} M parameters that knows {len(world.load_facts()):,} facts "
        f"about the world, and an editor that was trained on other entities than those below.\n"
    )
    dozen = cases(DOZEN, DOZEN_SEED)
    figures: dict[str, Any] = _show(editor, dozen, console)
    chosen = cases(FULL_EDITS) if full else dozen
    alone = [[case] for case in chosen]
    scores = {"mend": measure(editor, alone, "mend", console)}
    if full:
        scores["identity"] = measure(editor.untrained(), alone, "mend", console)
        scores["fine_tuning"] = measure(editor, alone, "fine_tuning", console)
    figures = {**scores["mend"].to_dict(), **figures}
    figures |= {name: score.to_dict() for name, score in scores.items() if name != "mend"}
    _print_scores(scores, console)
    if full:
        figures["batched"], tuned = {}, {}
        pool = cases(400, seed=SEED + 1)
        for size in SIMULTANEOUS:
            groups = list(_groups(pool, size, most=24)) if size > 1 else alone
            mend = scores["mend"] if size == 1 else measure(editor, groups, "mend", console)
            tuned[size] = scores["fine_tuning"] if size == 1 else measure(editor, groups, "fine_tuning", console)
            figures["batched"][str(size)] = {**mend.to_dict(), "fine_tuning": tuned[size].to_dict()}
        _print_batched(figures["batched"], console)
        if plot:
            _plot(figures["batched"], plot)
            console.print(text(f"Plot: {plot}"))
    figures["seconds"] = round(time.perf_counter() - started, 2)
    console.print(f"{figures['seconds']:.0f} s")
    return figures


def run_real(console: Console) -> dict[str, Any]:
    """Show a dozen edits of SmolLM2-135M-Instruct on ``console``; returns the figures."""
    started = time.perf_counter()
    if editors.directory(REAL) is None:
        raise FileNotFoundError(f"No editor for {REAL} ships with this version; make it: mendfast editors --help")
    editor = MendEditor.from_pretrained(REAL, *pretrained.load(REAL))
    console.print(
        f"{REAL}, {sum(p.numel() for p in editor.model.parameters()) / 1e6:.0f} M parameters, as it was published, and "
        "the editor that ships for it, which was trained on other entities than those below.\n"
    )
    figures = _show(editor, cases(DOZEN, DOZEN_SEED), console)
    names = {
        "exact_match": "edits taken",
        "rephrased": "in other words too",
        "unchanged": "unrelated answers as before",
    }
    console.print(", ".join(f"{figures[key]} of {DOZEN} {name}" for key, name in names.items()) + ".")
    figures["seconds"] = round(time.perf_counter() - started, 2)
    console.print(f"{figures['seconds']:.0f} s")
    return figures


def _show(editor: MendEditor, chosen: Sequence[Case], console: Console) -> dict[str, Any]:
    """Each edit written, asked and taken out again; how many were right."""
    table = Table(title="One edit each, written into the weights, then taken out", expand=True)
    for name, style, ratio in (("question", "", 5), ("before", "dim", 2), ("edit target", "bold", 2), ("after", "", 2)):
        table.add_column(name, style=style, ratio=ratio)
    rng, model, seconds = random.Random(SEED), editor.model, []
    unedited, right = bits(model), Counter[str]()
    others = [unrelated([case.fact], 1, rng)[0] for case in chosen]
    asked = [(case.question, case.paraphrase, other) for case, (other, _) in zip(chosen, others, strict=True)]
    # in one batch: a token of many answers costs little more than one of a few
    before = generate_answers(editor, [question for questions in asked for question in questions], LONGEST)
    bar = track(chosen, "editing", console=console, transient=True, disable=not console.is_terminal)
    for k, (case, questions, (_, true)) in enumerate(zip(bar, asked, others, strict=True)):
        old = before[3 * k : 3 * k + 3]
        started = time.perf_counter()
        edit = editor.edit(case.question, case.target).apply_(model)
        seconds.append(time.perf_counter() - started)
        new, same = _after(editor, questions, case.target, old[2])
        edit.revert_(model)
        goods = [exact_match(new[0], case.target), exact_match(new[1], case.target), same]
        kinds = ["", "[dim]paraphrase[/] ", "[dim]unrelated[/] "]
        for i, (question, good) in enumerate(zip(questions, goods, strict=True)):
            right[("exact_match", "rephrased", "unchanged")[i]] += good
            mark = f"[{'green' if good else 'red'}]{'✓' if good else '✗'} {escape(new[i])}[/]"
            said = escape(old[i].text)
            table.add_row(kinds[i] + question, said, case.target if i < 2 else f"[dim]({true})[/]", mark)
        table.add_section()
    console.print(table)
    console.print(f"From question and target to changed weights: {1e3 * statistics.median(seconds):.0f} ms (median).")
    same = bits(model) == unedited
    console.print(
        "All edits were written into the weights and taken out again: the weights are "
        + ("[green]the same bits[/] as before." if same else "[red]not the same bits[/].")
    )
    return {"exact_match": 0, "rephrased": 0, "unchanged": 0, **right, "reverted_bit_exact": same}


def _after(editor: MendEditor, questions: Sequence[str], target: str, old: Answer) -> tuple[list[str], bool]:
    """What the edited model answers to the question, its paraphrase and the unrelated one, each as far as it takes to
    tell right from wrong, and whether the unrelated answer is still ``old``."""
    rows = follow(editor, questions[2:], [old.ids])
    (start,) = agreed(rows.logits.argmax(-1), rows.labels, rows.sample, 1)
    same = start == old.ids

    def wrong(said: str) -> bool:
        return not can_match(said, target)

    def parted(said: str) -> bool:
        return not old.text.startswith(whole_words(said))

    left = 2 if same else 3
    given = generate_answers(
        editor, questions[:left], LONGEST, starts=[(), (), start][:left], enough=[wrong, wrong, parted][:left]
    )
    said = [one.text if one.ended else f"{one.text} …" for one in given]
    return said + [old.text] * same, same


def _print_scores(scores: dict[str, Score], console: Console) -> None:
    names = {"mend": "MEND", "identity": "untrained editor", "fine_tuning": "fine-tuning"}
    table = Table(title=f"{scores['mend'].n} held-out edits, one at a time")
    for name in ("system", "edit success", "generality", "drawdown"):
        table.add_column(name, justify="left" if name == "system" else "right")
    for name, score in scores.items():
        table.add_row(names[name], *(f"{getattr(score, key):.3f}" for key in FIGURES))
    console.print(table)


def _print_batched(batched: dict[str, dict], console: Console) -> None:
    table = Table(title="Simultaneous edits")
    table.add_column("edits at once", justify="right")
    table.add_column("system")
    for name in ("edit success", "generality", "drawdown", "batches"):
        table.add_column(name, justify="right")
    for size, row in batched.items():
        for system, of in (("MEND", row), ("fine-tuning", row["fine_tuning"])):
            table.add_row(size, system, *(f"{of[key]:.3f}" for key in FIGURES), str(of["n"]))
        table.add_section()
    console.print(table)


def _plot(batched: dict[str, dict], path: str | Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), sharex=True)
    sizes = [int(size) for size in batched]
    for axis, key in zip(axes, FIGURES, strict=True):
        axis.plot(sizes, [row[key] for row in batched.values()], "o-", label="MEND")
        axis.plot(sizes, [row["fine_tuning"][key] for row in batched.values()], "s--", label="fine-tuning")
        axis.set(xscale="log", xticks=sizes, xticklabels=sizes, title=key.replace("_", " "), ylim=(-0.05, 1.05))
        axis.set_xlabel("edits at once")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
