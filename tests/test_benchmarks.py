"""The logic of the benchmarks: counting, timing in turns, checks, the report and the comparison."""

from __future__ import annotations

import copy
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import contest, counts, machine, plots, readings, report, shapes, tables
from benchmarks.contest import Contest, Contestant, Work
from mendfast.objective import target_rows

ROOT = Path(__file__).parent.parent


class Benchmark:
    """As much of pytest-benchmark's fixture as a contest uses."""

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, target, setup, teardown, rounds):
        for _ in range(rounds):
            arguments, _ = setup()
            target(*arguments)
            teardown(*arguments)


@pytest.fixture
def rows(monkeypatch) -> list[dict]:
    monkeypatch.setattr(machine, "ceilings", lambda: {"bytes": 1e9, "float32": 1e10})
    monkeypatch.setattr(machine, "measure_ceilings", lambda: None)
    monkeypatch.setattr(machine, "cache_bytes", lambda: 1000)
    monkeypatch.setitem(contest.SECONDS, "cpu", 0.05)
    return []


def race(rows: list[dict], contestants: dict, **options) -> dict:
    Contest(Benchmark(), "question", rows, quick=False)(
        {"shape": "a", "rows": 1}, lambda seed: torch.full((100,), float(seed)), contestants, **options
    )
    return rows[-1]


def test_a_row_holds_what_it_took_and_the_floor(rows):
    def slow(x):
        time.sleep(0.02)
        return x * 2

    row = race(rows, {"mendfast": slow, "reference": lambda x: x * 2}, work=Work(1000, 5 * 10**7))
    ours = row["contestants"]["mendfast"]
    assert 0.02 <= ours["median_s"] < 0.1 and ours["first_quartile_s"] <= ours["third_quartile_s"]
    assert row["floor_s"] == pytest.approx(5e-3)
    assert row["times_floor"] == pytest.approx(ours["median_s"] / 5e-3)
    assert row["contestants"]["reference"]["median_s"] < 0.02
    assert readings.losses([row])[0][1] == "reference"


def test_floor_is_the_larger_of_bytes_and_operations(rows):
    assert machine.floor(2 * 10**9, 10) == 2 and machine.floor(10, 3 * 10**10) == 3


def test_contestants_take_turns_on_sets_past_the_cache(rows):
    """4 x 1,000 bytes of cache and 1,000 bytes of work: four sets, each contestant at another one."""
    seen = []

    def record(name):
        return lambda x: (seen.append((name, int(x[0]))), x)[1]

    race(rows, {"mendfast": record("mendfast"), "reference": record("reference")}, work=Work(1000, 1))
    timed = seen[2 + 4 : -2]
    assert {number for _, number in timed} == {0, 1, 2, 3}
    assert all(a[0] != b[0] for a, b in itertools.pairwise(timed))
    assert all(a[1] != b[1] for a, b in itertools.pairwise(timed))


def test_a_wrong_result_is_not_timed(rows):
    with pytest.raises(AssertionError, match="mendfast differs from reference"):
        race(rows, {"mendfast": lambda x: x + 1e-3, "reference": lambda x: x + 1}, work=Work(1000, 1))
    with pytest.raises(AssertionError, match="differs"):
        race(rows, {"mendfast": lambda x: x * torch.nan, "reference": lambda x: x + 1}, work=Work(1000, 1))
    assert not rows


def test_an_opponent_without_memory_is_reported_and_we_are_not_excused(rows):
    def full(x):
        raise torch.OutOfMemoryError("full")

    row = race(rows, {"mendfast": lambda x: x, "naive": full}, reference=None)
    assert row["contestants"]["naive"] == {"error": "out of memory"} and readings.opponents(row) == {}
    with pytest.raises(torch.OutOfMemoryError):
        race(rows, {"mendfast": full, "naive": lambda x: x}, reference=None)


def test_preparing_and_undoing_are_not_timed(rows):
    open_states = []

    def prepare(x):
        time.sleep(0.01)
        open_states.append(x)
        return x

    row = race(rows, {"mendfast": Contestant(lambda x: None, prepare, lambda x: open_states.pop())}, reference=None)
    assert row["contestants"]["mendfast"]["median_s"] < 0.005
    assert not open_states


def test_peak_memory_counts_what_is_alive_at_once():
    def call():
        a = torch.empty(1_000_000)
        b = torch.empty(500_000)
        del a
        return torch.empty(250_000), b

    assert contest.peak_bytes(call) == pytest.approx(6e6, rel=0.01)


@pytest.mark.parametrize("name", ["distilGPT-2", "BART-base", "BERT-base"])
def test_operations_are_those_that_pytorch_counts(name):
    """The model's own passes, against the flops that PyTorch counts while they run."""
    from torch.utils.flop_counter import FlopCounterMode

    shape = shapes.SHAPES[name].small()
    editor, tokens = shapes.make_editor(shape, "cpu", torch.float32), shapes.batch(shape, 2)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        target_rows(editor.model, tokens)
    count = counts.Counts(editor)
    ours = count.products(count.all, tokens) + 2 * count.head * count.targets(tokens)
    assert 0.9 * counter.get_total_flops() <= ours <= 1.05 * counter.get_total_flops()
    assert 0 < count.size(count.above) < count.size(count.all)


def result(**seconds: float) -> dict:
    """A result file with a row for each name."""

    def figures(value: float) -> dict:
        spread = {"median_s": value, "first_quartile_s": value * 0.9, "third_quartile_s": value * 1.1}
        return spread | {"rounds": 5, "peak_bytes": 10**6}

    rows = [
        {
            "test": f"bench::{name}", "question": "edit, end to end", "shape": name, "edits": 1, "dtype": "float32",
            "device": "cpu", "units": 1, "contestants": {"mendfast": figures(value), "naive": figures(0.2)},
            "bytes": 1000, "operations": 1000, "floor_s": 0.01, "times_floor": value / 0.01,
        }
        for name, value in seconds.items()
    ]  # fmt: skip
    described = {
        "device": "cpu", "name": "A CPU", "cpu": "A CPU", "cores": 2, "threads": 2,
        "versions": {"torch": "2", "transformers": "5"},
        "date": "2026-01-02", "commit": "0" * 40, "command": "run", "ceilings": {"bytes": 1e10, "float32": 1e11},
    }  # fmt: skip
    return {"format": "mendfast.benchmarks", "machine": described, "rows": rows, "need_a_gpu": ["bench::large"]}


def test_comparison_fails_past_the_tolerance(tmp_path, capsys):
    old, new = result(a=0.1, b=0.1, c=0.1), result(a=0.105, b=0.2, d=0.1)
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, content in zip(paths, (old, new), strict=True):
        path.write_text(json.dumps(content))
    arguments = ["--compare", *map(str, paths), "--tolerance"]
    assert report.main([*arguments, "0.1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["1.05", "2.00", "gone", "new", "2"]
    assert report.compare(old, old, 0.0)[1] == []
    assert report.compare(old, result(a=0.11, b=0.1, c=0.1), 0.2)[1] == []
    with pytest.raises(ValueError, match="no result"):
        paths[0].write_text("{}")
        readings.load(paths[0])


def test_report_says_where_it_loses_and_what_was_not_measured():
    text = report.readme([result(fast=0.05, slow=0.4)])
    assert "**4.0 ×**" in text and "**0.5 ×**" in text
    assert "Where it loses (1 of 2 rows)" in text and "| slow | 1 edit, float32 | 400 ms | naive | 2.00 × |" in text
    assert "not measured yet" in text and "1 rows" in text
    on_gpu = copy.deepcopy(result(fast=0.05))
    on_gpu["machine"] |= {"device": "cuda", "name": "A GPU", "gpu_driver": "1", "cuda": "13"}
    text = report.readme([on_gpu, result(fast=0.05)])
    assert "not measured yet" not in text and "No row is lost." in text


def test_names_of_files_and_units():
    described = result()["machine"]
    assert machine.result_name(described) == "a-cpu-2-cores-2026-01-02.json"
    assert [report.duration(s) for s in (12.3456, 0.0123, 4.5e-5)] == ["12.3 s", "12.3 ms", "45.0 µs"]
    assert [report.memory(b) for b in (2.5e9, 3e6)] == ["2.50 GB", "3.00 MB"]


def test_plots_are_drawn(tmp_path):
    content = result(a=0.05, b=0.4)
    content["rows"] += [dict(content["rows"][0], edits=5, units=5)]
    paths = plots.draw(content, tmp_path)
    assert [path.name for path in paths] == [f"cpu-{stem}.png" for stem in report.PLOTS]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_readme_holds_what_the_results_say(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().out


TIMED_ALONE = ("loading, import", "memory, adding", "memory, adding many", "memory, solving")
"""Contests with ``memory=False``."""


def test_a_committed_result_describes_itself():
    results = readings.latest()
    assert results
    for content in results:
        described = content["machine"]
        assert all(described[key] for key in ("name", "threads", "system", "python", "commit", "command", "date"))
        assert described["versions"]["torch"] and described["ceilings"]["bytes"] > 1e8
        for row in content["rows"]:
            timed_alone = row["question"] in TIMED_ALONE
            figures = {"median_s"} if timed_alone else {"median_s", "peak_bytes"}
            assert set(row["contestants"]["mendfast"]) >= figures, row
        assert (ROOT / "benchmarks/plots" / f"{described['device']}-speedup.png").is_file()


def evaluation(**changes) -> dict:
    figures = {"edit_success": 0.9, "generality": 0.8, "drawdown": 0.01, "ppl_drawdown": 0.5}
    figures = {name: {"mean": mean, "low": mean, "high": mean, "n": 3} for name, mean in figures.items()}
    row = {"system": "mend", "name": "MEND", "parameters": 7, "k": 1, "measured": 3, "failed": 0, "figures": figures}
    return {
        "task": "qa", "table": "systems", "model": "m", "editor": "e", "data": "d.jsonl", "known": None,
        "train_data": None, "seed": 0, "edits": 3, "read": 4, "problems": ["d.jsonl:3, alt: is empty"],
        "environment": {"model": "GPT2", "device": "cpu: a", "torch": "2", "transformers": "5", "date": "d"},
        "rows": [row], "examples": [{"target": "text of the data"}], **changes,
    }  # fmt: skip


def test_a_kept_table_says_how_it_was_made_and_holds_none_of_the_data(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "FOLDER", tmp_path / "tables")
    (tmp_path / "results.json").write_text(json.dumps(evaluation()))
    path = tables.add([tmp_path], "b", "Questions", ["mendfast train", "mendfast eval"])
    assert "text of the data" not in path.read_text()
    (tmp_path / "results.json").write_text(json.dumps(evaluation(task="generation")))
    tables.add([tmp_path], "a", "Text", [])
    (tmp_path / "results.json").write_text(json.dumps(evaluation(model=str(tmp_path))))
    with pytest.raises(ValueError, match="model is .*relative paths"):
        tables.add([tmp_path], "c", "", [])
    kept = tables.load()
    assert [result["title"] for result in kept] == ["Text", "Questions"]
    text = tables.page(kept)
    assert "mendfast train\nmendfast eval\n```" in text and "1 edits could not be asked" in text
    rows = [f"| {cells} |{' - |' * 5}" for cells in ("Text | 0.90 / 0.80 / 0.500", "Questions | 0.90 / 0.80 / 0.010")]
    assert tables.summary(kept).splitlines()[-2:] == rows


def test_a_table_of_several_seeds_holds_their_means_within_the_widest_interval():
    first, second = evaluation(seed=1), evaluation(seed=2)
    second["rows"][0]["figures"]["edit_success"] = {"mean": 0.5, "low": 0.3, "high": 0.7, "n": 3}
    second["rows"][0]["failed"] = 1
    chosen = {"learning_rate": 0.01, "max_steps": 100, "trials": 6, "edits": 4, "seconds": 2.0}
    first["rows"][0]["chosen"], second["rows"][0]["chosen"] = chosen, {**chosen, "learning_rate": 3e-4, "seconds": 41.0}
    both = tables.pooled([first, second])
    assert both["rows"][0]["figures"]["edit_success"] == {"mean": 0.7, "low": 0.3, "high": 0.9, "n": 6}
    page = tables.page([both | {"title": "t", "commands": []}])
    assert "means of seeds 1, 2." in page and "1 measurements failed" in page
    assert "| MEND | 0.01, 0.0003 | 100 | 6 | 4 | 2, 41 |" in page
    with pytest.raises(ValueError, match="seeds are 1, 1"):
        tables.pooled([first, first])
    with pytest.raises(ValueError, match="differ in limit: None, 3"):
        tables.pooled([first, {**second, "limit": 3}])
    with pytest.raises(ValueError, match="not of the same systems"):
        tables.pooled([first, {**second, "rows": []}])


def test_the_table_of_the_real_model_decides_and_hides_no_loss():
    def row(system: str, *means: float) -> dict:
        names = ("exact_match", "rephrase_exact_match", "unchanged", "seconds")
        return {"system": system, "name": system.upper(), "k": 1, "measured": 3,
                "figures": {name: {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}
                            for name, mean in zip(names, means, strict=True)}}  # fmt: skip

    rows = [row("ft", 1.0, 1.0, 0.1, 1.5), row("mend", 0.9, 0.9, 0.8, 0.25), row("identity", 0.0, 0.0, 1.0, 0.01)]
    real = evaluation(model="smollm2", rows=rows) | {"title": "zsRE"}
    lines = tables.deciding(real)
    assert [line.split(" |")[0] for line in lines[-3:]] == ["| MEND", "| FT", "| IDENTITY"]
    # 3 / (1 + 1 + 10); its interval is that of the share that is small: .1 h^2 / (3 .1^2)
    assert lines[-2] == "| FT | 0.25 ± 0.21 | 1.00 | 1.00 | - | 0.10 | - | - | 1,500 |"
    assert lines[-1].startswith("| IDENTITY | 0.00 | ")
    assert tables.summary([real]).startswith("3 edits of zsRE") and any("up to 0.10 (95 %)" in line for line in lines)


def test_the_tables_pages_hold_what_the_files_say(capsys):
    assert tables.load()
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_seven_billion_parameters_in_small(tmp_path):
    """Made, edited in 16 bits, trained from the disk: each in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.seven_billion", str(tmp_path / "model"), "--small"]
    chosen = ["--only", "edit-16bit", "train-offload", "--results", str(tmp_path / "rows.json")]
    done = subprocess.run([*command, *chosen], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    edited, trained = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert edited["edit seconds"] > 0 and trained["step seconds"] > 0 and trained["prefill seconds"] > 0
    assert 0.1 < edited["peak GiB"] < 2 and f"peak GiB {trained['peak GiB']:.2f}" in done.stdout
