"""What ``mendfast eval`` measured as text: a table for the terminal, Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..baselines.measure import FIGURES
from .console import plain
from .lengths import LENGTHENED


class Column(NamedTuple):
    """How a figure is printed."""

    title: str
    scale: float = 1.0
    form: str = ".3f"


COLUMNS = {
    "edit_success": Column("edit success"),
    "efficacy": Column("edit alone"),
    "generality": Column("generality"),
    "autoregressive": Column("generated"),  # of results from before answers were generated without the target's length
    "token_accuracy": Column("token accuracy"),
    "rouge_l": Column("ROUGE-L"),
    "exact_match": Column("exact match"),
    "rephrase_exact_match": Column("exact, rephrased"),
    "contains": Column("contains"),
    "first_sentence": Column("first sentence"),
    "never_stopped": Column("never stopped"),
    "exact_match_plain": Column("exact, plain"),
    "exact_match_chat": Column("exact, chat"),
    "exact_match_system": Column("exact, system"),
    "drawdown": Column("drawdown"),
    "unchanged": Column("unchanged"),
    "unchanged_relation": Column("unchanged, relation"),
    "unchanged_subject": Column("unchanged, subject"),
    "leaked": Column("leaked"),
    "first_choice_changed": Column("first choice changed"),
    "ppl_drawdown": Column("perplexity drawdown", form=".2g"),
    "kl": Column("KL", form=".2g"),
    "perplexity_rise": Column("perplexity rise", form=".2g"),
    "text_kl": Column("KL on text", form=".2g"),
    "portability": Column("portable"),
    "portability_exact_match": Column("portable, exact"),
    "premises": Column("yes or no"),
    "already": Column("right before"),
    "seconds": Column("ms", 1e3, ",.0f"),
    "peak_bytes": Column("peak MiB", 2**-20, ",.0f"),
}
PUBLISHED = {
    "fact_checking": ("FEVER, BERT-base", "drawdown", {
        "ft": ("0.76", "<0.001"), "ft_kl": ("0.64", "<0.001"), "enn": ("0.99", "0.003"), "ke": ("0.95", "0.004"),
        "mend": (">0.99", "<0.001"),
    }),
    "qa": ("zsRE, BART-base", "drawdown", {
        "ft": ("0.96", "<0.001"), "ft_kl": ("0.89", "<0.001"), "enn": ("0.99", "<0.001"), "ke": ("0.98", "<0.001"),
        "mend": ("0.98", "0.002"),
    }),
    "generation": ("Wikitext, distilGPT-2", "perplexity drawdown", {
        "ft": ("0.29", "0.938"), "ft_kl": ("0.17", "0.059"), "enn": ("0.93", "0.094"), "ke": ("0.25", "0.595"),
        "mend": ("0.86", "0.225"),
    }),
}  # fmt: skip
"""Mitchell et al. (2022), Table 4: data and model, the kind of drawdown, and edit success and drawdown by system."""


def columns(result: dict[str, Any]) -> list[str]:
    return [name for name in COLUMNS if any(name in row["figures"] for row in result["rows"])]


Part = tuple[str, list[str], list[list[str]]]
"""A title, a header and rows."""
MANY = {"batched": "at once", "sequential": "in turn"}
"""Tables of several edits, and what their number is called."""
SHORT = {
    "edit_success": "success", "efficacy": "kept", "generality": "rephr.", "exact_match": "exact", "drawdown": "drawd.",
    "unchanged": "unch.", "ppl_drawdown": "ppl dd", "perplexity_rise": "ppl +", "seconds": "ms",
}  # fmt: skip
"""Titles in a terminal, so that a table fits 80 columns."""


def drawdown_of(result: dict[str, Any]) -> str:
    return "ppl_drawdown" if result["task"] == "generation" else "drawdown"


def cells_of(result: dict[str, Any], names: Sequence[str]) -> Iterator[list[str]]:
    """A table's header, then its rows: system, number of edits where it differs, parameters, the named figures."""
    many = MANY.get(result["table"])
    yield ["system", *[many] * bool(many), "trained parameters", *(COLUMNS[name].title for name in names)]
    for row in result["rows"]:
        cells = [row["name"], *[str(row["k"])] * bool(many), f"{row['parameters']:,}"]
        yield cells + [number(name, row["figures"].get(name, {}).get("mean")) for name in names]


def number(name: str, value: float | None) -> str:
    column = COLUMNS[name]
    return "" if value is None else f"{value * column.scale:{column.form}}"


def caption(result: dict[str, Any]) -> str:
    """What was measured, in a sentence or two."""
    failed = sum(row["failed"] for row in result["rows"])
    seed = result["seed"]
    said = f"means of seeds {', '.join(map(str, seed))}" if isinstance(seed, list) else f"seed {seed}"
    text = f"Task {result['task']}, {result['edits']:,} edits of {result['data']}, {said}."
    left_out = result["read"] - result["edits"]
    text += f" {left_out:,} edits could not be asked." if left_out else ""
    return text + (f" {failed:,} measurements failed." if failed else "")


def console_table(result: dict[str, Any]) -> Table:
    """The table for a terminal of 80 columns: the figures that systems are told apart by."""
    names = ["edit_success", "generality", "exact_match", drawdown_of(result), "unchanged", "seconds"]
    if result["table"] == "sequential":
        names = ["efficacy", *names[1:5], "perplexity_rise", "seconds"]
    names = [name for name in names if name in columns(result)]
    many = MANY.get(result["table"])
    table = Table(box=SIMPLE_HEAD, padding=0)
    for i, title in enumerate(["system", *[many] * bool(many), *(SHORT[name] for name in names)]):
        table.add_column(title, justify="right" if i else "left")
    for cells in list(cells_of(result, names))[1:]:
        start = 1 + bool(many)
        table.add_row(*map(plain, [*cells[:start], *cells[start + 1 :]]))  # without the parameters
    return table


def markdown(result: dict[str, Any]) -> str:
    """The table, and below it what is known beside it: published figures, old edits, chosen rates, the harness."""
    header, *rows = cells_of(result, columns(result))
    lines = [caption(result), "", *_pipes(header, rows)]
    for found in (published(result), lengths(result), survival(result), rates(result), harness(result)):
        if found:
            lines += ["", found[0], "", *_pipes(found[1], found[2])]
    return "\n".join(lines) + "\n"


def _pipes(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]


def published(result: dict[str, Any]) -> Part | None:
    if result["table"] != "systems" or result["task"] not in PUBLISHED:
        return None
    where, drawdown, figures = PUBLISHED[result["task"]]
    names = {row["system"]: row["name"] for row in result["rows"]}
    rows = [[names[key], *figures[key]] for key in names if key in figures]
    title = f"As published, on other data and a larger model ({where}: Mitchell et al. 2022, Table 4):"
    return (title, ["system", "edit success", drawdown], rows) if rows else None


def survival(result: dict[str, Any]) -> Part | None:
    """How old edits fare, by system and length: a title, a header and rows; None where no edits came in turn."""
    rows = [row for row in result["rows"] if row.get("survival")]
    if not rows:
        return None
    ages = sorted({(part["from"], part["to"]) for row in rows for part in row["survival"]})
    header = ["system", "in turn", *(str(low) if low == high else f"{low} to {high}" for low, high in ages)]
    body = []
    for row in rows:
        found = {(part["from"], part["to"]): f"{part['mean']:.3f}" for part in row["survival"]}
        body.append([row["name"], str(row["k"]), *(found.get(age, "") for age in ages)])
    return "Edits still answered right at the end, by how many came after them:", header, body


def lengths(result: dict[str, Any]) -> Part | None:
    """Edits one at a time by the length of their targets; None where all are short."""
    rows = [row for row in result["rows"] if row.get("lengths")]
    if not rows:
        return None
    names = [name for name in LENGTHENED if any(name in part["figures"] for row in rows for part in row["lengths"])]
    body = []
    for row in rows:
        for part in row["lengths"]:
            last = part["to"]
            many = f"{part['from']} to {last}" if last else f"{part['from']} and more"
            cells = [number(name, part["figures"].get(name)) for name in names]
            body.append([row["name"], many, str(part["n"]), *cells])
    return "By the target's length:", ["system", "tokens", "edits", *(COLUMNS[name].title for name in names)], body


def rates(result: dict[str, Any]) -> Part | None:
    """What was chosen on validation edits, and what that cost."""
    rows = {row["system"]: row for row in result["rows"] if row.get("chosen")}
    if not rows:
        return None
    body = []
    for row in rows.values():
        chosen = row["chosen"]
        steps = chosen.get("epochs", chosen.get("max_steps", ""))
        rate = chosen.get("learning_rate", chosen.get("weight"))
        body.append([row["name"], _each(rate, "g"), _each(steps), _each(chosen["trials"]), _each(chosen["edits"]),
                     _each(chosen["seconds"], ",.0f")])  # fmt: skip
    title = "Chosen on validation edits, which are measured in no row:"
    return title, ["system", "rate, or weight of C", "steps at most", "trials", "edits of each", "seconds"], body


def _each(value: Any, form: str = "") -> str:
    """A value, or those of several seeds."""
    return ", ".join(format(one, form) for one in (value if isinstance(value, list) else [value]))


def harness(result: dict[str, Any]) -> Part | None:
    """Tasks of lm-evaluation-harness: each figure after an edit, and before it."""
    found = result.get("harness_results")
    if not found:
        return None
    names = {row["system"]: row["name"] for row in result["rows"]}
    figures = list(dict.fromkeys(name for part in found.values() for name in part.get("after", ())))
    body = []
    for key, part in found.items():
        after, before = part.get("after", {}), part.get("before", {})
        cells = [f"{after[name]:.3f} ({before[name]:.3f})" if name in after else "" for name in figures]
        body.append([names[key], str(part["k"]), *(cells if after else [part["error"], *[""] * (len(figures) - 1)])])
    title = "lm-evaluation-harness on the model after an edit (and before it):"
    return title, ["system", "edits", *(figures or ["error"])], body


def comma_separated(result: dict[str, Any]) -> str:
    """One line for each system and size; each figure with its interval of 95 %."""
    stream = io.StringIO()
    names = [name for name in FIGURES if name in columns(result)]
    parts = ("mean", "low", "high")
    writer = csv.writer(stream, lineterminator="\n")
    head = ["system", "name", "k", "parameters", "measured", "failed"]
    writer.writerow([*head, *(f"{name}_{part}" for name in names for part in parts)])
    for row in result["rows"]:
        figures = [row["figures"].get(name, {}).get(part, "") for name in names for part in parts]
        writer.writerow([*(row[key] for key in head), *figures])
    return stream.getvalue()
