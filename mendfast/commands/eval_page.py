"""The report of ``mendfast eval`` as one HTML file that needs nothing beside it, and the files around it."""

from __future__ import annotations

import base64
import difflib
import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..answers import contains, exact_match
from ..baselines.measure import FIGURES
from ..files import atomic_write
from .eval_plots import Pareto, apart, pareto_png, paretos, plot, radius
from .eval_report import (
    COLUMNS,
    MANY,
    caption,
    columns,
    comma_separated,
    drawdown_of,
    harness,
    lengths,
    markdown,
    number,
    published,
    rates,
    survival,
)

GROUPS = {
    "the main ones": (
        "exact_match", "rephrase_exact_match", "unchanged", "edit_success", "generality", "drawdown", "ppl_drawdown",
        "seconds",
    ),
    "generated answers": (
        "exact_match", "rephrase_exact_match", "contains", "rouge_l", "first_sentence", "never_stopped",
        "exact_match_plain", "exact_match_chat", "exact_match_system", "portability_exact_match", "premises",
    ),
    "teacher-forced": (
        "edit_success", "efficacy", "generality", "token_accuracy", "autoregressive", "portability", "already",
    ),
    "what must stay": (
        "unchanged", "unchanged_relation", "unchanged_subject", "leaked", "first_choice_changed", "kl", "drawdown",
        "ppl_drawdown", "perplexity_rise", "text_kl",
    ),
    "cost": ("seconds", "peak_bytes", "parameters"),
}  # fmt: skip
"""Figures that are shown together: all of them at once are wider than a page."""


def write_report(directory: str | Path, result: dict[str, Any]) -> Path:
    """Write ``table.md``, ``table.csv``, ``results.json``, ``figures.png``, ``pareto.png`` and ``report.html``; the
    latter's path."""
    directory, picture = Path(directory), plot(result)
    files = {
        "table.md": markdown(result).encode(),
        "table.csv": comma_separated(result).encode(),
        "results.json": json.dumps(result, indent=2, ensure_ascii=False).encode() + b"\n",
        "figures.png": picture,
        "pareto.png": pareto_png(result),
        "report.html": page(result, picture).encode(),
    }
    for name, content in files.items():
        if content is not None:
            atomic_write(directory / name, content)
    return directory / "report.html"


_STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#8882;--good:#178a3c;--bad:#c2342b;--near:#9a6a00;--ink:#2563eb}
@media(prefers-color-scheme:dark){:root{--good:#5fce7f;--bad:#ff8a80;--near:#e0b050;--ink:#7aa7ff}}
*{box-sizing:border-box}[hidden]{display:none!important}
body{font:16px/1.5 system-ui,sans-serif;max-width:80rem;margin:2rem auto;padding:0 1rem;overflow-wrap:anywhere}
h1{font-size:1.6rem}h2{font-size:1.2rem;margin-top:2.2rem}
table{border-collapse:collapse;font-size:.9rem;max-width:100%}.wide{width:100%}
th,td{padding:.3rem .45rem;border-bottom:1px solid var(--line);text-align:right;vertical-align:top}
th{font-weight:600;overflow-wrap:normal}:is(th,td):first-child{text-align:left}
th button{all:unset;cursor:pointer;font-weight:600}th button:focus-visible{outline:2px solid var(--ink)}
th[aria-sort=ascending] button::after{content:" \\2191"}th[aria-sort=descending] button::after{content:" \\2193"}
tbody tr:hover{background:var(--soft)}small{opacity:.7;display:block}td small{font-size:.68rem;white-space:nowrap}
.choices{display:flex;flex-wrap:wrap;gap:.4rem;margin:.6rem 0;align-items:center}
.choices button,select{font:inherit;font-size:.85rem;padding:.15rem .6rem;border:1px solid var(--line);
border-radius:1rem;background:none;color:inherit;cursor:pointer}
.choices button[aria-pressed=true]{background:var(--soft);border-color:currentColor}
.good{color:var(--good)}.bad{color:var(--bad)}.near{color:var(--near)}
img{width:100%;background:#fff;border-radius:6px}svg{width:100%;height:auto;display:block}
figure{margin:0;max-width:44rem}
.figures{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,30rem),1fr))}
svg text{fill:currentColor;font-size:14px}svg .axis{stroke:currentColor;opacity:.35}
svg .front{fill:none;stroke:var(--ink);opacity:.5}svg circle{fill:#8889}svg .best circle{fill:var(--ink)}
details{border-top:1px solid var(--line);padding:.4rem 0}summary{cursor:pointer}
.question{margin:.6rem 0 1rem}.question p{margin:.1rem 0}.kind{opacity:.7;font-size:.85em}
.answers{display:grid;gap:.15rem .8rem;grid-template-columns:minmax(6rem,10rem) 1fr;margin:.3rem 0 0 1rem}
.answers dt{font-weight:600}.answers dd{margin:0}.answers>div{display:contents}
ins{text-decoration:none;background:#2ecc7133;border-radius:3px}del{background:#e74c3c26;border-radius:3px;opacity:.75}
dt{font-weight:600}dd{margin:0 0 .4rem 1.2rem}.note{border-left:3px solid var(--line);padding-left:.8rem}
@media(max-width:46rem){.fold thead{display:none}
.fold tr{display:block;padding:.5rem 0;border-bottom:1px solid var(--line)}
.fold td{display:flex;justify-content:space-between;gap:1rem;border:0;padding:.1rem 0}
.fold td:first-child{font-weight:600}
.fold td:not(:first-child)::before{content:attr(data-label);opacity:.75}.answers{grid-template-columns:1fr}
.answers dd{margin-bottom:.4rem}}
"""
_SCRIPT = """
const all=(s,e=document)=>[...e.querySelectorAll(s)],off=new Set();
let many='';
const hide=(e,on)=>e.toggleAttribute('hidden',on),other=e=>many!==''&&e.dataset.k!==undefined&&e.dataset.k!==many;
function show(){all('[data-s]').forEach(e=>hide(e,off.has(e.dataset.s)||other(e)));
all('figure[data-k]').forEach(e=>hide(e,other(e)))}
all('button[data-system]').forEach(b=>b.onclick=()=>{const k=b.dataset.system,
on=b.getAttribute('aria-pressed')==='true';
b.setAttribute('aria-pressed',!on);on?off.add(k):off.delete(k);show()});
all('select[data-many]').forEach(s=>s.onchange=()=>{many=s.value;show()});
function group(n){all('[data-g]').forEach(e=>hide(e,!e.dataset.g.split('|').includes(n)));
all('button[data-group]').forEach(b=>b.setAttribute('aria-pressed',b.dataset.group===n))}
all('button[data-group]').forEach(b=>b.onclick=()=>group(b.dataset.group));
if(all('button[data-group]').length)group(all('button[data-group]')[0].dataset.group);
all('th button').forEach(b=>b.onclick=()=>{const th=b.parentElement,i=[...th.parentElement.children].indexOf(th),
up=th.getAttribute('aria-sort')==='descending',body=th.closest('table').tBodies[0];
all('th',th.parentElement).forEach(o=>o.removeAttribute('aria-sort'));
th.setAttribute('aria-sort',up?'ascending':'descending');
const v=r=>{const t=r.children[i].dataset.v;return t===undefined||t===''?null:isNaN(t)?t:+t};
[...body.rows].sort((a,b)=>{const x=v(a),y=v(b);if(x===null||y===null)return(x===null)-(y===null);
const words=typeof x==='string'||typeof y==='string',o=words?String(x).localeCompare(String(y)):x-y;
return up?o:-o}).forEach(r=>body.append(r))});
"""


def page(result: dict[str, Any], picture: bytes) -> str:
    """The HTML report: a table to sort and filter, the Pareto plot, answers before and after."""
    source = base64.b64encode(picture).decode()
    environment = ", ".join(f"{name} {value}" for name, value in result["environment"].items())
    defined = "".join(f"<dt>{COLUMNS[n].title}</dt><dd>{_e(FIGURES.get(n, ''))}</dd>" for n in columns(result))
    parts = [
        f"<h1>mendfast eval: {_e(result['table'])}, {_e(result['task'])}</h1>",
        f"<p>{_e(caption(result))} Below each mean its 95 % interval by bootstrap over edits.</p>",
        _filters(result),
        _main_table(result),
    ]
    if found := paretos(result):
        said = "Up and to the right is better; the larger the dot, the longer an edit takes."
        figures = "".join(_pareto(one, result) for one in found)
        parts.append(f'<h2>Success and locality</h2><p>{said}</p><div class="figures">{figures}</div>')
    names = ", ".join(COLUMNS[name].title for name in ("edit_success", "generality", drawdown_of(result)))
    parts.append(f'<h2>Plot</h2><img alt="{names}" src="data:image/png;base64,{source}">')
    parts.append(_examples(result))
    shown_beside = {"Published figures": published, "Long answers": lengths, "Old edits": survival, "Rates": rates,
                    "Elsewhere": harness}  # fmt: skip
    for title, made in shown_beside.items():
        if part := made(result):
            parts.append(f"<h2>{title}</h2><p>{_e(part[0])}</p>{_table(part[1], part[2])}")
    if left_out := result.get("left_out"):
        shown = "".join(f"<li>{_e(key)}: {_e(reason)}</li>" for key, reason in left_out.items())
        parts.append(f"<h2>Left out</h2><ul>{shown}</ul>")
    if result["problems"]:
        shown = "".join(f"<li>{_e(problem)}</li>" for problem in result["problems"][:20])
        parts.append(f"<h2>Data: {len(result['problems']):,} lines to look at</h2><ul>{shown}</ul>")
    if failed := [row for row in result["rows"] if row["failed"]]:
        rows = [f"<li>{_e(row['name'])}: {row['failed']:,}; first: {_e(row['first_error'])}</li>" for row in failed]
        parts.append(f"<h2>Edits that failed</h2><ul>{''.join(rows)}</ul>")
    parts.append(f"<h2>What the figures mean</h2><dl>{defined}</dl><p><small>{_e(environment)}</small></p>")
    parts.append(f"<script>{_SCRIPT}</script>")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
    title = f"<title>mendfast eval: {_e(result['table'])}, {_e(result['task'])}</title>"
    return f'<!doctype html><html lang="en"><head>{head}{title}</head><body>{"".join(parts)}</body></html>\n'


def _e(text: Any) -> str:
    return html.escape(str(text))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_e(cell)}</th>" for cell in header)
    body = ""
    for row in rows:
        cells = zip(header, row, strict=True)
        body += "<tr>" + "".join(f'<td data-label="{_e(title)}">{_e(cell)}</td>' for title, cell in cells) + "</tr>"
    return f'<table class="fold"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


# -- the table ---------------------------------------------------------------------------------------------


def _filters(result: dict[str, Any]) -> str:
    """Buttons that choose figures and systems, and the number of edits."""
    names = [*columns(result), "parameters"]
    shown = [group for group, members in GROUPS.items() if any(name in names for name in members)]
    groups = "".join(f'<button data-group="{group}">{group}</button>' for group in shown)
    systems = "".join(
        f'<button data-system="{_e(key)}" aria-pressed="true">{_e(name)}</button>'
        for key, name in {row["system"]: row["name"] for row in result["rows"]}.items()
    )
    sizes = sorted({row["k"] for row in result["rows"]})
    many = ""
    if len(sizes) > 1:
        options = "".join(f'<option value="{k}">{k:,} {MANY.get(result["table"], "")}</option>' for k in sizes)
        many = f'<select data-many aria-label="edits"><option value="">all sizes</option>{options}</select>'
    return (
        f'<div class="choices" role="group" aria-label="figures">{groups}</div>'
        f'<div class="choices" role="group" aria-label="systems">{systems}{many}</div>'
    )


def _main_table(result: dict[str, Any]) -> str:
    names, many = columns(result), MANY.get(result["table"])
    shown = [*names, "parameters"]
    place = {name: "|".join(group for group, members in GROUPS.items() if name in members) for name in shown}
    titles = {name: COLUMNS[name].title for name in names} | {"parameters": "trained parameters"}
    head = "<th><button>system</button></th>" + (f"<th><button>{many}</button></th>" if many else "")
    head += "".join(f'<th data-g="{place[name]}"><button>{titles[name]}</button></th>' for name in shown)
    body = ""
    for row in result["rows"]:
        cells = f'<td data-v="{_e(row["name"])}">{_e(row["name"])}</td>'
        if many:
            cells += f'<td data-label="{many}" data-v="{row["k"]}">{row["k"]:,}</td>'
        for name in names:
            cells += _figure(name, row["figures"].get(name), titles[name], place[name])
        cells += (
            f'<td data-g="{place["parameters"]}" data-label="trained parameters" data-v="{row["parameters"]}">'
            f"{row['parameters']:,}</td>"
        )
        body += f'<tr data-s="{_e(row["system"])}" data-k="{row["k"]}">{cells}</tr>'
    return f'<table class="wide fold"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _figure(name: str, figure: dict[str, float] | None, title: str, group: str) -> str:
    value = "" if figure is None else f"{figure['mean']!r}"
    opened = f'<td data-g="{group}" data-label="{title}" data-v="{value}">'
    if figure is None:
        return f"{opened}</td>"
    low, high = (number(name, figure[part]) for part in ("low", "high"))
    interval = f"<small>{low} to {high}</small>" if name != "peak_bytes" else ""
    return f"{opened}<span>{number(name, figure['mean'])}{interval}</span></td>"


# -- the Pareto plot ---------------------------------------------------------------------------------------

_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 640, 420, 46, 16, 130, 50


def _pareto(one: Pareto, result: dict[str, Any]) -> str:
    """A scalable picture, in the page's own colours."""

    def across(x: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * min(max(x, 0), 1)

    def down(y: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * min(max(y, 0), 1)

    drawn = ""
    for tick in (0, 0.25, 0.5, 0.75, 1):
        x, y = across(tick), down(tick)
        lines = f"M{x:.0f} {down(0):.0f}V{down(1):.0f}M{across(0):.0f} {y:.0f}H{across(1):.0f}"
        drawn += f'<path class="axis" d="{lines}"/>'
        drawn += f'<text x="{x:.0f}" y="{down(0) + 18:.0f}" text-anchor="middle">{tick:g}</text>'
        drawn += f'<text x="{across(0) - 8:.0f}" y="{y + 5:.0f}" text-anchor="end">{tick:g}</text>'
    line = " ".join(f"{across(point.x):.1f},{down(point.y):.1f}" for point in one.frontier)
    drawn += f'<polyline class="front" points="{line}"/>'
    moves, named = apart([(p.x, p.y) for p in one.points], near=0.052, step=18.0), ""
    for point, (_, dy) in zip(one.points, moves, strict=True):
        x, y, r = across(point.x), down(point.y), radius(point, one.points)
        said = f"{point.name}: {point.y:.3f}, {point.x:.3f}, {point.seconds * 1e3:,.0f} ms"
        group = f'<g data-s="{_e(point.key)}"{" class=best" if point.best else ""}><title>{_e(said)}</title>'
        drawn += f'{group}<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}"/></g>'
        named += f'{group}<text x="{x + r + 4:.1f}" y="{y + 5 - dy:.1f}">{_e(point.name)}</text></g>'
    drawn += named  # above all dots
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    drawn += f'<text x="{middle:.0f}" y="{_HEIGHT - 8}" text-anchor="middle">{_e(one.x)}</text>'
    many = MANY.get(result["table"])
    title = f"{one.k:,} {many}: " if many else ""
    return (
        f'<figure data-k="{one.k}"><figcaption>{_e(title)}{_e(one.y)}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{_e(one.y)} against {_e(one.x)}">{drawn}</svg>'
        "</figure>"
    )


# -- answers before and after ------------------------------------------------------------------------------


def _examples(result: dict[str, Any]) -> str:
    names = {row["system"]: row["name"] for row in result["rows"]}
    if not result["examples"]:
        return ""
    body = ""
    for i, edit in enumerate(result["examples"]):
        asked = "".join(_question(question, edit["target"], names) for question in edit["questions"])
        title = f"{_e(edit['questions'][0]['prompt'])} → {_e(edit['target'])}"
        body += f"<details{' open' if i == 0 else ''}><summary>{title}</summary>{asked}</details>"
    return (
        "<h2>Answers before and after</h2><p>Each edit alone: the edited question, a rephrasing, and an unrelated "
        "question, whose answer should stay. ✓ as it should be, ~ the target among other words, ✗ neither; words that "
        f"the edit brought are marked <ins>so</ins>, those that it took <del>so</del>.</p>{body}"
    )


def _question(question: dict[str, Any], target: str, names: dict[str, str]) -> str:
    unrelated = question["kind"] == "unrelated"
    befores = list(dict.fromkeys(question["before"].values()))
    said = "".join(f"<p>before: {_e(before)}</p>" for before in befores[:1])
    answers = ""
    for key, name in names.items():
        if key not in question["after"]:
            continue
        before, after = question["before"][key], question["after"][key]
        if unrelated:
            kind = "good" if after == before else "bad"
        else:
            kind = "good" if exact_match(after, target) else "near" if contains(after, target) else "bad"
        sign = {"good": "✓", "near": "~", "bad": "✗"}[kind]
        marked = marked_difference(before, after)
        answer = f"<span class={kind}>{sign}</span> {marked}"
        answers += f'<div data-s="{_e(key)}"><dt>{_e(name)}</dt><dd>{answer}</dd></div>'
    kind = f"<span class=kind>{question['kind']}</span>"
    return f'<div class="question"><p>{_e(question["prompt"])} {kind}</p>{said}<dl class="answers">{answers}</dl></div>'


def marked_difference(before: str, after: str) -> str:
    """``after`` as HTML, its words that ``before`` lacks marked as inserted; those that are gone stand among them where
    the two have much in common."""
    old, new = (re.findall(r"\s+|\w+|[^\w\s]", text) for text in (before, after))
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    alike, out = matcher.ratio() >= 0.5, ""
    for kind, a, b, c, d in matcher.get_opcodes():
        gone, come = "".join(old[a:b]), "".join(new[c:d])
        if kind == "equal":
            out += _e(come)
            continue
        if gone.strip() and alike:
            out += f"<del>{_e(gone)}</del>"
        out += f"<ins>{_e(come)}</ins>" if come.strip() else _e(come)
    return out
