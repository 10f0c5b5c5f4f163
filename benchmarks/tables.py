"""What `mendfast eval` measured: benchmarks/TABLES.md and the README's summary, from benchmarks/tables/*.json.

    python -m benchmarks.tables                       # write both
    python -m benchmarks.tables --check               # fail if they differ from the files
    python -m benchmarks.tables --add runs/eval qa-gpt2 --title "..." --command "mendfast train ..." --command "..."
    python -m benchmarks.tables --add runs/seed0 runs/seed1 runs/seed2 fc-bert ...   # one table of three seeds
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from mendfast.commands.eval_report import markdown

from .report import ROOT, check, replace_block

HERE = Path(__file__).parent
FOLDER = HERE / "tables"
MARKERS = ("<!-- tables -->", "<!-- /tables -->")
SYSTEMS = {"mend": "MEND", "enn": "ENN", "ke": "KE", "ft": "FT", "ft_kl": "FT+KL", "identity": "untrained"}
SUMMARY = ("edit_success", "generality")  # and the task's drawdown
DECIDING = "smollm2"
"""The model whose table decides: a real one, asked in its own words."""
COLUMNS = {
    "exact_match": "answers the question",
    "rephrase_exact_match": "in other words",
    "exact_match_plain": "without its chat form",
    "unchanged": "other answers kept, to the word",
    "first_choice_changed": "other tokens changed",
    "text_kl": "KL on WikiText-2",
    "seconds": "ms an edit",
}


def load() -> list[dict]:
    """Every kept table, in the order of the files' names."""
    return [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]


def add(directories: Sequence[Path], name: str, title: str, commands: Sequence[str]) -> Path:
    """Keep the results of an evaluation, or of equal ones of several seeds, without their examples, the data's."""
    result = pooled([json.loads((directory / "results.json").read_text()) for directory in directories])
    for key in ("model", "editor", "data", "known", "train_data"):
        if result[key] and Path(result[key]).is_absolute():
            raise ValueError(f"{key} is {result[key]}; evaluate with relative paths, which mean something elsewhere.")
    kept = {"title": title, "commands": list(commands), **result, "examples": [], "problems": len(result["problems"])}
    path = FOLDER / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    return path


def pooled(results: Sequence[dict]) -> dict:
    """Evaluations that differ in their seeds as one: means of the means, within the widest of their intervals."""
    first = results[0]
    if len(results) == 1:
        return first
    for key in ("task", "table", "data", "known", "limit", "unrelated", "text"):
        if len({str(result.get(key)) for result in results}) > 1:
            raise ValueError(f"The evaluations differ in {key}: {', '.join(str(r.get(key)) for r in results)}.")
    seeds = [result["seed"] for result in results]
    if len({*seeds}) < len(seeds):
        raise ValueError(f"The evaluations' seeds are {', '.join(map(str, seeds))}; give each of its own.")
    rows = [{(row["system"], row["k"]): row for row in result["rows"]} for result in results]
    if any(found.keys() != rows[0].keys() for found in rows):
        raise ValueError("The evaluations are not of the same systems and sizes.")
    return {**first, "seed": seeds, "rows": [_pooled_row([found[key] for found in rows]) for key in rows[0]]}


def _pooled_row(rows: Sequence[dict]) -> dict:
    figures = {}
    for name in rows[0]["figures"]:
        found = [row["figures"][name] for row in rows if name in row["figures"]]
        figures[name] = {
            "mean": sum(figure["mean"] for figure in found) / len(found),
            "low": min(figure["low"] for figure in found),
            "high": max(figure["high"] for figure in found),
            "n": sum(figure["n"] for figure in found),
        }
    pooled = {**rows[0], "failed": sum(row["failed"] for row in rows), "figures": figures}
    if chosen := [row["chosen"] for row in rows if row.get("chosen")]:
        values = {name: [each.get(name) for each in chosen] for name in chosen[0]}
        pooled["chosen"] = {name: each[0] if len({*each}) == 1 else each for name, each in values.items()}
    return pooled


def page(results: Sequence[dict]) -> str:
    """benchmarks/TABLES.md."""
    lines = [
        "# What was measured",
        "",
        "Made by `python -m benchmarks.tables` from `benchmarks/tables/`, which holds intervals of 95 % too.",
        "*Edit success* is the mean of the edit and its rephrasings, *edit alone* and *generality* those apart (every",
        "target token the model's first choice, teacher-forced); *generated* the same by greedy decoding; *drawdown*",
        "accuracy lost on unrelated inputs, *KL* their mean divergence. Times beside other work on the same machine.",
    ]
    for result in results:
        environment = result["environment"]
        versions = f"PyTorch {environment['torch']}, transformers {environment['transformers']}"
        made = "; ".join((environment["model"], environment["device"], versions, environment["date"]))
        lines += ["", f"## {result['title']}", "", f"{made}."]
        lines += ["", "```bash", *result["commands"], "```", "", markdown({**result, "problems": []}).rstrip()]
    return "\n".join(lines) + "\n"


def deciding(result: dict) -> list[str]:
    """The README's first table: every system on the real model, in the order of what counts, best first."""
    rows = sorted(result["rows"], key=lambda row: -_balance(row["figures"])[0])
    environment, count = result["environment"], max(row["measured"] for row in result["rows"])
    shares = [row["figures"].get(name, {}) for row in rows for name in COLUMNS if name not in ("text_kl", "seconds")]
    uncertain = max((share["high"] - share["low"]) / 2 for share in shares if share)
    lines = [
        f"{count} edits of zsRE's validation questions on SmolLM2-135M-Instruct, one at a time, the answers read as",
        "the edited model gives them: greedy, ending by itself, at most 64 tokens, equal to the target but for case,",
        "articles and punctuation. Systems by the harmonic mean of the first two columns and the fourth, of which each",
        f"share is uncertain by up to {uncertain:.2f} (95 %); {environment['device']}.",
        "",
        f"| system | mean | {' | '.join(COLUMNS.values())} |",
        f"|---|{'---:|' * (len(COLUMNS) + 1)}",
    ]
    for row in rows:
        mean, half = _balance(row["figures"])
        cells = [f"{mean:.2f} ± {half:.2f}" if mean else "0.00"]
        cells += [_figure(name, row["figures"].get(name)) for name in COLUMNS]
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return lines


def _balance(figures: dict) -> tuple[float, float]:
    """The harmonic mean of answers right, as asked and in other words, and of other answers left as they were; and half
    of its interval of 95 % by those of the three, to first order and as if independent: h^2 / (n x^2) for a share x."""
    shares = [figures[name] for name in ("exact_match", "rephrase_exact_match", "unchanged") if name in figures]
    means = [share["mean"] for share in shares]
    if not means or min(means) <= 0:
        return 0.0, 0.0
    mean = len(means) / sum(1 / x for x in means)
    half = [(share["high"] - share["low"]) / 2 * mean**2 / (len(means) * share["mean"] ** 2) for share in shares]
    return mean, sum(part**2 for part in half) ** 0.5


def _figure(name: str, figure: dict | None) -> str:
    if figure is None:
        return "-"
    return f"{1e3 * figure['mean']:,.0f}" if name == "seconds" else f"{figure['mean']:.{3 if 'kl' in name else 2}f}"


def summary(results: Sequence[dict]) -> str:
    """The README's tables: the one that decides, and success, generality and drawdown of every system on every task."""
    tables = [result for result in results if result["table"] == "systems"]
    real = [result for result in tables if result["model"] == DECIDING and result["task"] == "qa"]
    tables = [result for result in tables if result not in real]
    lines = [*(line for result in real for line in [*deciding(result), ""])]
    lines += [
        "Edit success (the mean of an edit and its rephrasings) / generality (the rephrasings alone) / drawdown (of",
        "perplexity on WikiText-2), one edit at a time; - was not run.",
        "Every table, with its commands and the published figures: [benchmarks/TABLES.md](benchmarks/TABLES.md).",
        "",
        f"| task | {' | '.join(SYSTEMS.values())} |",
        f"|---|{'---|' * len(SYSTEMS)}",
    ]
    for result in tables:
        rows = {row["system"]: row["figures"] for row in result["rows"]}
        cells = [_cell(rows.get(key), result["task"]) for key in SYSTEMS]
        lines.append(f"| {result['title']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(figures: dict | None, task: str) -> str:
    if not figures:
        return "-"
    means = [f"{figures[name]['mean']:.2f}" for name in SUMMARY if name in figures]
    drawdown = "ppl_drawdown" if task == "generation" else "drawdown"
    return " / ".join([*means, f"{figures[drawdown]['mean']:.3f}" if drawdown in figures else "-"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tables",
        description=__doc__.split("\n")[0],
        epilog='Example: python -m benchmarks.tables --add runs/eval qa-gpt2 --title "zsRE, GPT-2"',
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail if README.md or TABLES.md differ")
    parser.add_argument("--add", nargs="+", metavar="DIR", help="keep what mendfast eval wrote into DIR ..., as NAME")
    parser.add_argument("--title", default="", help="of the table that is added")
    parser.add_argument("--command", action="append", default=[], help="that made it; may be repeated")
    args = parser.parse_args(argv)
    if args.add:
        *directories, name = args.add
        if not directories:
            parser.error("--add takes one directory or several, and the table's name")
        print(add([Path(directory) for directory in directories], name, args.title or name, args.command))
    results = load()
    readme = ROOT / "README.md"
    pages = {
        readme: replace_block(readme.read_text(), summary(results), MARKERS),
        HERE / "TABLES.md": page(results),
    }
    if args.check:
        return check(pages, "python -m benchmarks.tables")
    for path, text in pages.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
