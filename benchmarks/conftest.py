"""``pytest benchmarks/ --benchmark-only`` times everything that this machine can run.

``--benchmark-disable`` runs each benchmark once on small shapes, with its checks, and times nothing.
``--results FILE`` keeps the rows, with the machine that they come from, after each of them; rows that FILE holds of
the same commit stay, and with ``--resume`` are not timed again.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mendfast.files import atomic_write

from . import machine, readings, report
from .contest import QUICK_AMOUNT, Contest, set_floor

_ROWS, _LEFT = pytest.StashKey[list[dict]](), pytest.StashKey[list[str]]()


def pytest_addoption(parser) -> None:
    parser.addoption("--results", type=Path, metavar="FILE", help="keep the rows of this run in FILE, as JSON")
    parser.addoption("--resume", action="store_true", help="leave out what the file of --results holds")


def pytest_configure(config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.stash[_ROWS], config.stash[_LEFT] = [], []
    machine.keep_memory()


def pytest_collection_modifyitems(config, items) -> None:
    if config.getoption("--resume"):
        done = {row["test"] for row in _kept(config.getoption("--results"))["rows"]}
        _keep(config, items, [item for item in items if _test_of(item) not in done])
    if config.getoption("benchmark_disable"):
        # cut to QUICK_AMOUNT, the larger sizes of a shape are all the same
        _keep(config, items, list({_quick_key(item): item for item in reversed(items)}.values())[::-1])


def _keep(config, items: list, kept: list) -> None:
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _quick_key(item) -> tuple:
    given = dict(getattr(getattr(item, "callspec", None), "params", {}))
    if (case := given.pop("case", None)) is not None:
        given["case"] = (case.shape.name, min(case.size, QUICK_AMOUNT))
    return item.path, item.originalname, tuple(sorted(given.items()))


def _test_of(item) -> str:
    return f"{item.path.stem}::{item.name}"


@pytest.fixture
def contest(request, benchmark) -> Iterator[Contest]:
    """Checks and times contestants; see :class:`benchmarks.contest.Contest`."""
    question = request.module.__name__.rpartition(".bench_")[2].replace("_", " ")
    detail = request.function.__name__.removeprefix("test_").replace("_", " ")
    name = question if detail == question else f"{question}, {detail}"
    benchmark.group = name
    rows: list[dict] = []
    yield Contest(benchmark, name, rows, benchmark.disabled)
    request.config.stash[_ROWS] += [{"test": _test_of(request.node), **row} for row in rows]
    if request.config.getoption("--results") and rows:
        _write(request.config)


@pytest.fixture(autouse=True)
def _where_it_fits(request, pytestconfig) -> None:
    """Skips what a CPU can't do in reasonable time, unless everything is small anyway."""
    if machine.device().type == "cuda" or pytestconfig.getoption("benchmark_disable"):
        return
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if not all(getattr(value, "on_cpu", True) for value in parameters.values()):
        pytestconfig.stash[_LEFT].append(_test_of(request.node))
        pytest.skip("needs a GPU")


def pytest_terminal_summary(terminalreporter, config) -> None:
    rows = config.stash[_ROWS]
    if rows:
        terminalreporter.section("mendfast and its opponents")
        for line in report.plain_table(rows):
            terminalreporter.write_line(line)
    if config.stash[_LEFT]:
        terminalreporter.write_line(f"{len(config.stash[_LEFT])} rows need a GPU.")


def pytest_sessionfinish(session) -> None:
    if session.config.getoption("--results") and session.config.stash[_ROWS]:
        _write(session.config)


@functools.cache
def _machine() -> dict:
    command = os.environ.get("MENDFAST_BENCHMARK_COMMAND") or "pytest benchmarks --benchmark-only"
    return machine.describe(command) | {"notes": os.environ.get("MENDFAST_BENCHMARK_NOTES", "")}


def _kept(path: Path) -> dict:
    """What the file holds of the same commit, or nothing."""
    if path is not None and path.is_file():
        result = readings.load(path)
        if result["machine"]["commit"] == _machine()["commit"]:
            return result
    return {"rows": [], "need_a_gpu": []}


def _write(config) -> None:
    path, rows = config.getoption("--results"), config.stash[_ROWS]
    kept, fresh = _kept(path), {row["test"] for row in rows}
    for row in rows:
        if "bytes" in row:
            set_floor(row)  # the ceilings may have been found to be higher since
    result = {
        "format": "mendfast.benchmarks",
        "format_version": 1,
        "machine": {**_machine(), "ceilings": machine.ceilings()},
        "need_a_gpu": sorted({*kept["need_a_gpu"], *config.stash[_LEFT]}),
        "rows": [row for row in kept["rows"] if row["test"] not in fresh] + rows,
    }
    atomic_write(path, (json.dumps(result, indent=1) + "\n").encode())
