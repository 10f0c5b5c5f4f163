"""What the result files say: the README's table, every row, plots, and the comparison of two files.

    python -m benchmarks.report                                   # README.md, benchmarks/RESULTS.md, benchmarks/plots
    python -m benchmarks.report --compare OLD NEW --tolerance 0.1 # fails if a row lost more than a tenth
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .plots import draw
from .readings import BOUNDS, HERE, OURS, PLOTS, ROOT, identity, latest, load, losses, opponents, seconds, size_of

BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
HEADLINES = ("edit, end to end", "meta step")


# -- text ------------------------------------------------------------------------------------------------------


def duration(value: float) -> str:
    for unit, factor in (("s", 1), ("ms", 1e3), ("µs", 1e6)):
        if value * factor >= 1 or unit == "µs":
            return f"{three_digits(value * factor)} {unit}"
    raise AssertionError


def memory(value: float) -> str:
    return f"{three_digits(value / 1e9)} GB" if value >= 1e9 else f"{three_digits(value / 1e6)} MB"


def three_digits(value: float) -> str:
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{decimals}f}"


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(line)} |" for line in body)]


def _against(row: dict) -> str:
    parts = [f"{name} {ratio:.2f} ×" for name, ratio in opponents(row).items()]
    parts += [f"{name}: {f['error']}" for name, f in row["contestants"].items() if "error" in f]
    bounds = [name for name in BOUNDS if "median_s" in row["contestants"].get(name, {})]
    parts += [f"({name}: {duration(seconds(row, name))})" for name in bounds]
    return ", ".join(parts) or "-"


def _line(row: dict) -> list[str]:
    figures = row["contestants"][OURS]
    spread = (figures["third_quartile_s"] - figures["first_quartile_s"]) / figures["median_s"]
    return [
        row["question"],
        row["shape"],
        size_of(row),
        f"{duration(figures['median_s'])} ± {spread:.0%}",
        _against(row),
        f"{row['times_floor']:.2f}" if "times_floor" in row else "-",
        memory(figures["peak_bytes"]) if "peak_bytes" in figures else "-",
    ]


_HEAD = ("question", "shape", "size", "median ± quartiles", "the others take", "× floor", "peak memory")


def plain_table(rows: Sequence[dict]) -> list[str]:
    """For a terminal."""
    lines = [_HEAD, *(_line(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEAD))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _machine(machine: dict) -> str:
    versions = machine["versions"]
    where = (
        f"{machine['name']}, driver {machine['gpu_driver']}, CUDA {machine['cuda']}"
        if machine["device"] == "cuda"
        else f"{machine['name']}, {machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    )
    rates = machine["ceilings"]
    units = {"float32": "TF32"} if machine["device"] == "cuda" else {}  # as machine.measure_ceilings has it
    measured = ", ".join(f"{rates[k] / 1e9:,.0f} Gflop/s in {units.get(k, k)}" for k in rates if k != "bytes")
    return (
        f"{where}; PyTorch {versions['torch']}, transformers {versions['transformers']}; {machine['date']}, commit "
        f"{(machine['commit'] or 'unknown')[:10]}, `{machine['command']}`. "
        f"Measured ceilings: {rates['bytes'] / 1e9:,.1f} GB/s, {measured}."
        f"{' ' + machine['notes'] if machine.get('notes') else ''}"
    )


def _headline(row: dict) -> list[str]:
    ours, naive = row["contestants"][OURS], row["contestants"].get("naive", {})
    if "median_s" in naive:
        against = (duration(naive["median_s"]), f"**{naive['median_s'] / ours['median_s']:.1f} ×**")
    else:
        against = (naive.get("error", "-"), "-")
    bare = row["contestants"].get("bare pass", {})
    return [
        row["question"],
        row["shape"],
        f"{row['units']:,}",
        duration(ours["median_s"]),
        duration(ours["median_s"] / row["units"]),
        *against,
        f"{ours['median_s'] / bare['median_s']:.2f} ×" if "median_s" in bare else "-",
        f"{row['times_floor']:.1f} ×",
        f"{memory(ours['peak_bytes'])} / {memory(naive['peak_bytes']) if 'peak_bytes' in naive else '-'}",
    ]


def readme(results: Sequence[dict]) -> str:
    """The README's block between its markers."""
    lines = [
        "`pytest benchmarks/ --benchmark-only` times every row on this machine; `python -m benchmarks.run` also keeps",
        "them in `benchmarks/results/`, and `python -m benchmarks.report` makes these tables and plots from the files.",
        "Models have their real shapes and random weights; edits have 20 tokens, locality samples 200, the editor rank",
        "1,920 (SmolLM2's 384). \"Naive\" is Algorithms 1 and 2 as the paper writes them, one edit at a time with",
        "d × d gradients (`benchmarks/naive_mend.py`), its results checked against ours before anything is timed.",
        "The floor is the larger of bytes and operations that can't be done without over the copy and matmul",
        "rates measured in the same run. The bare pass is the model's forward pass and a backward pass that stops",
        "at the first edited layer, by PyTorch alone.",
        "Every row, with all opponents: [benchmarks/RESULTS.md](benchmarks/RESULTS.md).",
    ]
    for result in results:
        rows = [row for row in result["rows"] if row["question"] in HEADLINES]
        lines += ["", _machine(result["machine"]), ""]
        head = ("", "model", "edits", "time", "per edit", "naive", "faster", "to a bare pass", "to the floor",
                "peak memory, ours / naive")  # fmt: skip
        lines += _table(head, map(_headline, rows))
        lost = losses(result["rows"])
        lines += ["", f"Where it loses ({len(lost)} of {len(result['rows'])} rows):" if lost else "No row is lost."]
        lines += [""] * bool(lost)
        lines += _table(
            ("question", "shape", "size", "ours", "faster", "by"),
            (
                [r["question"], r["shape"], size_of(r), duration(seconds(r)), name, f"{1 / ratio:.2f} ×"]
                for r, name, ratio in lost
            ),
        ) if lost else []  # fmt: skip
        prefix = f"benchmarks/plots/{result['machine']['device']}"
        lines += ["", *(f"![{title}]({prefix}-{stem}.png)" for stem, title in PLOTS.items())]
    missing = sorted({name for result in results for name in result["need_a_gpu"]})
    if missing and not any(result["machine"]["device"] == "cuda" for result in results):
        lines += [
            "",
            f"On a GPU: **not measured yet**. {len(missing)} rows need one (GPT-2-XL, GPT-J-6B, T5-XL, Llama-3-8B,",
            "Qwen2.5-7B, many edits at a time), and torch.compile and Liger-Kernel race there. `benchmarks/gpu.sh`",
            "installs, tests, tunes and measures on a machine that has one.",
        ]
    return "\n".join(lines)


def every_row(results: Sequence[dict]) -> str:
    """benchmarks/RESULTS.md."""
    lines = [
        "# Every row",
        "",
        "Made by `python -m benchmarks.report` from `benchmarks/results/`. \"naive 3.00 ×\" means that naive takes",
        "three times as long; below 1 it is faster. In parentheses: times of what does less than is asked. ± is the",
        "distance of the quartiles. Peak memory is what PyTorch allocates above the start of the call.",
    ]
    for result in results:
        machine = result["machine"]
        lines += ["", f"## {machine['name']}", "", _machine(machine), "", *_table(_HEAD, map(_line, result["rows"]))]
        if result["need_a_gpu"]:
            missing = ", ".join(result["need_a_gpu"])
            lines += ["", f"Need a GPU ({len(result['need_a_gpu'])} rows): {missing}."]
    if not any(result["machine"]["device"] == "cuda" for result in results):
        lines += ["", "## GPU", "", "Not measured yet."]
    for path in sorted((HERE / "results" / "seven_billion").glob("*.json")):
        lines += ["", *seven_billion(json.loads(path.read_text()))]
    return "\n".join(lines) + "\n"


def seven_billion(result: dict) -> list[str]:
    """What benchmarks/seven_billion.py measured on one machine."""
    machine, names = result["machine"], list(dict.fromkeys(name for row in result["rows"] for name in row))
    body = [
        [f"{row[name]:,.2f}" if isinstance(row.get(name), float) else row.get(name, "") for name in names]
        for row in result["rows"]
    ]
    return [
        f"## Seven billion parameters, {machine['name']}",
        "",
        "A random model of Llama-2-7B's shape, an editor of rank 1,920 for the MLPs of its last three blocks: edits",
        "with the weights in 16, 8 and 4 bits, and training by four edits a step, the frozen blocks on disk. Each is a",
        "process of its own; \"own GiB\" is its largest resident set less pages of the model's files, which the system",
        "takes back where it needs the room.",
        f"{machine['threads']} threads; PyTorch {machine['versions']['torch']}; {machine['date']}, commit "
        f"{(machine['commit'] or 'unknown')[:10]}, `{machine['command']}`.",
        "",
        *_table(names, body),
    ]


def replace_block(text: str, block: str, markers: tuple[str, str] = (BEGIN, END)) -> str:
    """``text`` with what stands between the markers replaced."""
    begin, end = markers
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"README.md must hold the markers {begin} and {end} once each.")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{block}\n{end}{rest.split(end)[1]}"


def check(pages: Mapping[Path, str], command: str) -> int:
    """Say which files do not hold their text, which ``command`` would write; 1 if there are any."""
    stale = [path.name for path, text in pages.items() if not path.is_file() or path.read_text() != text]
    print(f"Stale: {', '.join(stale)}; run {command}." if stale else "Up to date.")
    return 1 if stale else 0


# -- comparing -------------------------------------------------------------------------------------------------


def compare(old: dict, new: dict, tolerance: float) -> tuple[list[str], list[str]]:
    """(a line for each row, those that failed): slower by more than ``tolerance``, or gone."""
    before, after = ({identity(row): row for row in result["rows"]} for result in (old, new))
    lines, failed = [], []
    for key, row in before.items():
        if key not in after:
            line = f"gone          {key}"
            failed.append(line)
        else:
            ratio = seconds(after[key]) / seconds(row)
            mark = "slower" if ratio > 1 + tolerance else "faster" if ratio < 1 / (1 + tolerance) else ""
            line = f"{ratio:6.2f} {mark:6} {key}"
            if mark == "slower":
                failed.append(line)
        lines.append(line)
    lines += [f"new           {key}" for key in after if key not in before]
    return lines, failed


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__.split("\n")[0],
        epilog="Example: python -m benchmarks.report --compare old.json new.json --tolerance 0.1",
    )
    parser.add_argument("--compare", nargs=2, metavar=("OLD", "NEW"), help="compare two result files row by row")
    parser.add_argument("--tolerance", type=float, default=0.1, help="the loss that still passes (default 0.1)")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if README.md or RESULTS.md differ")
    args = parser.parse_args(argv)
    if args.compare:
        lines, failed = compare(*map(load, args.compare), args.tolerance)
        print("\n".join(lines))
        print(f"{len(failed)} of {len(lines)} rows failed at a tolerance of {args.tolerance:.0%}.")
        return 1 if failed else 0
    results = latest()
    pages = {
        ROOT / "README.md": replace_block((ROOT / "README.md").read_text(), readme(results)),
        HERE / "RESULTS.md": every_row(results),
    }
    if args.check:
        return check(pages, "python -m benchmarks.report")
    for path, text in pages.items():
        path.write_text(text)
    for result in results:
        draw(result, HERE / "plots")
    return 0


if __name__ == "__main__":
    sys.exit(main())
