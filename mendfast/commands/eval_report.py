"""What ``mendfast eval`` writes: Markdown, CSV, JSON, a PNG plot, and one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..baselines.measure import FIGURES
from ..files import atomic_write
from .console import plain


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
    "exact_match": Column("exact match"),
    "rephrase_exact_match": Column("exact, rephrased"),
    "contains": Column("contains"),
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


def write_report(directory: str | Path, result: dict[str, Any]) -> Path:
    """Write ``table.md``, ``table.csv``, ``results.json``, ``figures.png`` and ``report.html``; the latter's path."""
    directory, picture = Path(directory), plot(result)
    files = {
        "table.md": markdown(result).encode(),
        "table.csv": comma_separated(result).encode(),
        "results.json": json.dumps(result, indent=2, ensure_ascii=False).encode() + b"\n",
        "figures.png": picture,
        "report.html": page(result, picture).encode(),
    }
    for name, content in files.items():
        atomic_write(directory / name, content)
    return directory / "report.html"


def _columns(result: dict[str, Any]) -> list[str]:
    return [name for name in COLUMNS if any(name in row["figures"] for row in result["rows"])]


MANY = {"batched": "at once", "sequential": "in turn"}
"""Tables of several edits, and what their number is called."""
SHORT = {
    "edit_success": "success", "efficacy": "kept", "generality": "rephr.", "exact_match": "exact", "drawdown": "drawd.",
    "unchanged": "unch.", "ppl_drawdown": "ppl dd", "perplexity_rise": "ppl +", "seconds": "ms",
}  # fmt: skip
"""Titles in a terminal, so that a table fits 80 columns."""


def _drawdown(result: dict[str, Any]) -> str:
    return "ppl_drawdown" if result["task"] == "generation" else "drawdown"


def _cells(result: dict[str, Any], names: Sequence[str]) -> Iterator[list[str]]:
    """A table's header, then its rows: system, number of edits where it differs, parameters, the named figures."""
    many = MANY.get(result["table"])
    yield ["system", *[many] * bool(many), "trained parameters", *(COLUMNS[name].title for name in names)]
    for row in result["rows"]:
        cells = [row["name"], *[str(row["k"])] * bool(many), f"{row['parameters']:,}"]
        yield cells + [_number(name, row["figures"].get(name, {}).get("mean")) for name in names]


def _number(name: str, value: float | None) -> str:
    column = COLUMNS[name]
    return "" if value is None else f"{value * column.scale:{column.form}}"


def caption(result: dict[str, Any]) -> str:
    """What was measured, in a sentence or two."""
    failed = sum(row["failed"] for row in result["rows"])
    text = f"Task {result['task']}, {result['edits']:,} edits of {result['data']}, seed {result['seed']}."
    left_out = result["read"] - result["edits"]
    text += f" {left_out:,} edits could not be asked." if left_out else ""
    return text + (f" {failed:,} measurements failed." if failed else "")


def console_table(result: dict[str, Any]) -> Table:
    """The table for a terminal of 80 columns: the figures that systems are told apart by."""
    names = ["edit_success", "generality", "exact_match", _drawdown(result), "unchanged", "seconds"]
    if result["table"] == "sequential":
        names = ["efficacy", *names[1:5], "perplexity_rise", "seconds"]
    names = [name for name in names if name in _columns(result)]
    many = MANY.get(result["table"])
    table = Table(box=SIMPLE_HEAD, padding=0)
    for i, title in enumerate(["system", *[many] * bool(many), *(SHORT[name] for name in names)]):
        table.add_column(title, justify="right" if i else "left")
    for cells in list(_cells(result, names))[1:]:
        start = 1 + bool(many)
        table.add_row(*map(plain, [*cells[:start], *cells[start + 1 :]]))  # without the parameters
    return table


def markdown(result: dict[str, Any]) -> str:
    """The table, and below it the published figures where there are some."""
    header, *rows = _cells(result, _columns(result))
    lines = [caption(result), "", *_pipes(header, rows)]
    if published := _published(result):
        lines += ["", published[0], "", *_pipes(published[1], published[2])]
    if old := _survival(result):
        lines += ["", old[0], "", *_pipes(old[1], old[2])]
    return "\n".join(lines) + "\n"


def _pipes(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]


def _published(result: dict[str, Any]) -> tuple[str, list[str], list[list[str]]] | None:
    if result["table"] != "systems" or result["task"] not in PUBLISHED:
        return None
    where, drawdown, figures = PUBLISHED[result["task"]]
    names = {row["system"]: row["name"] for row in result["rows"]}
    rows = [[names[key], *figures[key]] for key in names if key in figures]
    title = f"As published, on other data and a larger model ({where}: Mitchell et al. 2022, Table 4):"
    return (title, ["system", "edit success", drawdown], rows) if rows else None


def _survival(result: dict[str, Any]) -> tuple[str, list[str], list[list[str]]] | None:
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


def comma_separated(result: dict[str, Any]) -> str:
    """One line for each system and size; each figure with its interval of 95 %."""
    stream = io.StringIO()
    names = [name for name in FIGURES if name in _columns(result)]
    parts = ("mean", "low", "high")
    writer = csv.writer(stream, lineterminator="\n")
    head = ["system", "name", "k", "parameters", "measured", "failed"]
    writer.writerow([*head, *(f"{name}_{part}" for name in names for part in parts)])
    for row in result["rows"]:
        figures = [row["figures"].get(name, {}).get(part, "") for name in names for part in parts]
        writer.writerow([*(row[key] for key in head), *figures])
    return stream.getvalue()


# -- pictures ----------------------------------------------------------------------------------------------


def plot(result: dict[str, Any]) -> bytes:
    """Edit success, generality and drawdown, with intervals: bars by system, or lines by the number of edits; of edits
    in turn also running text's perplexity and how old edits fare."""
    from matplotlib.figure import Figure

    many, in_turn = MANY.get(result["table"]), result["table"] == "sequential"
    wanted = ["edit_success", "generality", _drawdown(result)]
    wanted = ["efficacy", _drawdown(result), "perplexity_rise"] if in_turn else wanted
    names = [name for name in wanted if name in _columns(result)]
    systems = list(dict.fromkeys(row["name"] for row in result["rows"]))
    count = len(names) + in_turn
    figure = Figure(figsize=(3.7 * count, 3.6 if many else 1.4 + 0.32 * len(systems)), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False, sharey=not many)[0]
    for axis, name in zip(panels, names, strict=False):
        (_lines if many else _bars)(axis, result["rows"], systems, name)
        axis.set_title(COLUMNS[name].title)
        axis.grid(alpha=0.3, axis="both" if many else "x")
        if many:
            axis.set_xlabel(f"edits {many}")
        if many and name in ("edit_success", "efficacy", "generality"):
            axis.set_ylim(-0.03, 1.03)
        elif name in ("edit_success", "generality"):
            axis.set_xlim(0, 1.03)
        elif name == "perplexity_rise":
            axis.set_yscale("symlog")
    if in_turn:
        _ages(panels[-1], result["rows"], systems)
    if many:
        panels[0].legend(fontsize="small" if len(systems) > 5 else None)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    return stream.getvalue()


def _ages(axis: Any, rows: Sequence[dict[str, Any]], systems: list[str]) -> None:
    """How old edits fare at the end of each system's longest sequence."""
    longest = {row["name"]: row for row in sorted(rows, key=lambda row: row["k"]) if row.get("survival")}
    ages = sorted({(part["from"], part["to"]) for row in longest.values() for part in row["survival"]})
    for i, system in enumerate(systems):
        if system in longest:
            found = longest[system]["survival"]
            below, above = zip(*map(_spread, found), strict=True)
            places = [ages.index((part["from"], part["to"])) for part in found]
            means = [part["mean"] for part in found]
            axis.errorbar(places, means, [below, above], marker="os^dvx"[i % 6], label=system, capsize=2)
    axis.set(xlabel="edits made since", title="still right at the end", ylim=(-0.03, 1.03))
    axis.set_xticks(range(len(ages)), [str(low) if low == high else f"{low} to {high}" for low, high in ages])
    axis.grid(alpha=0.3)


def _spread(figure: dict[str, float]) -> tuple[float, float]:
    return max(0.0, figure["mean"] - figure["low"]), max(0.0, figure["high"] - figure["mean"])


def _bars(axis: Any, rows: Sequence[dict[str, Any]], systems: list[str], name: str) -> None:
    found = [(systems.index(row["name"]), row["figures"][name]) for row in rows if name in row["figures"]]
    for place, figure in found:
        below, above = _spread(figure)
        color = "tab:blue" if place == 0 else "tab:gray"
        axis.barh(place, figure["mean"], xerr=[[below], [above]], color=color, error_kw={"elinewidth": 1})
    axis.locator_params(axis="x", nbins=5)
    axis.set_yticks(range(len(systems)), systems)
    axis.set_ylim(len(systems) - 0.5, -0.5)


def _lines(axis: Any, rows: Sequence[dict[str, Any]], systems: list[str], name: str) -> None:
    for i, system in enumerate(systems):
        found = [(row["k"], row["figures"][name]) for row in rows if row["name"] == system and name in row["figures"]]
        if found:
            below, above = zip(*(_spread(figure) for _, figure in found), strict=True)
            means = [figure["mean"] for _, figure in found]
            axis.errorbar([k for k, _ in found], means, [below, above], marker="os^dvx"[i % 6], label=system, capsize=2)
    sizes = sorted({row["k"] for row in rows})
    axis.set(xscale="log")
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.minorticks_off()


# -- one page ----------------------------------------------------------------------------------------------

_STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#8882;--good:#178a3c;--bad:#c2342b}
@media(prefers-color-scheme:dark){:root{--good:#5fce7f;--bad:#ff8a80}}
body{font:16px/1.5 system-ui,sans-serif;max-width:80rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem}h2{font-size:1.2rem;margin-top:2.2rem}
.scroll{overflow-x:auto}.scroll :is(th,td):first-child{position:sticky;left:0;background:Canvas}
table{border-collapse:collapse;font-size:.9rem}
th,td{padding:.3rem .45rem;border-bottom:1px solid var(--line);text-align:right;vertical-align:top}
:is(th,td):first-child{min-width:6rem}:is(th,td):first-child,.text :is(th,td){text-align:left}th{font-weight:600}
tbody tr:hover{background:var(--soft)}small{opacity:.7;display:block}td small{font-size:.68rem;white-space:nowrap}
tr.first td{border-top:2px solid var(--line)}.kind{opacity:.7;font-size:.85em}
.good{color:var(--good)}.bad{color:var(--bad)}img{width:100%;background:#fff;border-radius:6px}
dt{font-weight:600}dd{margin:0 0 .4rem 1.2rem}.note{border-left:3px solid var(--line);padding-left:.8rem}
"""


def page(result: dict[str, Any], picture: bytes) -> str:
    """The HTML report: table with intervals, plot, examples before and after, published figures, what was left out."""
    source = base64.b64encode(picture).decode()
    environment = ", ".join(f"{name} {value}" for name, value in result["environment"].items())
    defined = "".join(f"<dt>{COLUMNS[n].title}</dt><dd>{_e(FIGURES.get(n, ''))}</dd>" for n in _columns(result))
    parts = [
        f"<h1>mendfast eval: {_e(result['table'])}, {_e(result['task'])}</h1>",
        f"<p>{_e(caption(result))} Below each mean its 95 % interval by bootstrap over edits.</p>",
        f'<div class="scroll">{_main_table(result)}</div>',
        f'<h2>Plot</h2><img alt="edit success, generality, drawdown" src="data:image/png;base64,{source}">',
        _examples(result),
    ]
    if published := _published(result):
        title, header, rows = published
        parts.append(f'<h2>Published figures</h2><div class="note"><p>{_e(title)}</p>{_table(header, rows)}</div>')
    if old := _survival(result):
        parts.append(f'<h2>Old edits</h2><p>{_e(old[0])}</p><div class="scroll">{_table(old[1], old[2])}</div>')
    if result["problems"]:
        shown = "".join(f"<li>{_e(problem)}</li>" for problem in result["problems"][:20])
        parts.append(f"<h2>Data: {len(result['problems']):,} lines to look at</h2><ul>{shown}</ul>")
    if failed := [row for row in result["rows"] if row["failed"]]:
        shown = [f"<li>{_e(row['name'])}: {row['failed']:,}; first: {_e(row['first_error'])}</li>" for row in failed]
        parts.append(f"<h2>Edits that failed</h2><ul>{''.join(shown)}</ul>")
    parts.append(f"<h2>What the figures mean</h2><dl>{defined}</dl><p><small>{_e(environment)}</small></p>")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
    title = f"<title>mendfast eval: {_e(result['table'])}, {_e(result['task'])}</title>"
    return f'<!doctype html><html lang="en"><head>{head}{title}</head><body>{"".join(parts)}</body></html>\n'


def _e(text: Any) -> str:
    return html.escape(str(text))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_e(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{_e(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _main_table(result: dict[str, Any]) -> str:
    names = _columns(result)
    header, *rows = _cells(result, names)
    body = ""
    for cells, row in zip(rows, result["rows"], strict=True):
        plain = "".join(f"<td>{_e(cell)}</td>" for cell in cells[: -len(names)])
        body += f"<tr>{plain}{''.join(_figure(name, row['figures'].get(name)) for name in names)}</tr>"
    head = "".join(f"<th>{_e(cell)}</th>" for cell in header)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _figure(name: str, figure: dict[str, float] | None) -> str:
    if figure is None:
        return "<td></td>"
    low, high = (_number(name, figure[part]) for part in ("low", "high"))
    interval = f"<small>{low} to {high}</small>" if name != "peak_bytes" else ""
    return f"<td>{_number(name, figure['mean'])}{interval}</td>"


def _examples(result: dict[str, Any]) -> str:
    names = {row["system"]: row["name"] for row in result["rows"]}
    if not result["examples"]:
        return ""
    body = ""
    for edit in result["examples"]:
        for i, question in enumerate(edit["questions"]):
            unrelated = question["kind"] == "unrelated"
            first = next(iter(question["before"].values()))
            cells = f"<td>{_e(question['prompt'])} <span class=kind>{question['kind']}</span></td><td>{_e(first)}</td>"
            cells += f"<td>{'' if unrelated else _e(edit['target'])}</td>"
            for key in names:
                after = question["after"].get(key, "")
                wanted = question["before"].get(key) if unrelated else edit["target"]
                right = after == wanted or (not unrelated and after.startswith(edit["target"]))
                cells += f"<td class={'good' if right else 'bad'}>{'✓' if right else '✗'} {_e(after)}</td>"
            body += f"<tr{' class=first' if i == 0 else ''}>{cells}</tr>"
    head = "".join(f"<th>{_e(title)}</th>" for title in ("question", "before", "edit target", *names.values()))
    return (
        "<h2>Answers before and after</h2><p>Each edit alone: the edited question, a rephrasing, and an unrelated "
        "question, whose answer should stay.</p>"
        f'<div class="scroll"><table class="text"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )
