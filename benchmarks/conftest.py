"""``pytest benchmarks/ --benchmark-only`` times everything that this machine can run.

``--benchmark-disable`` runs each benchmark once on small shapes, with its checks, and times nothing.
``--results FILE`` writes the rows, with the machine that they come from.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from . import machine, report
from .contest import Contest

_ROWS, _LEFT = pytest.StashKey[list[dict]](), pytest.StashKey[list[str]]()


def pytest_addoption(parser) -> None:
    parser.addoption("--results", type=Path, metavar="FILE", help="write the rows of this run to FILE, as JSON")


def pytest_configure(config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.stash[_ROWS], config.stash[_LEFT] = [], []


@pytest.fixture
def contest(request, benchmark) -> Contest:
    """Checks and times contestants; see :class:`benchmarks.contest.Contest`."""
    question = request.module.__name__.rpartition(".bench_")[2].replace("_", " ")
    detail = request.function.__name__.removeprefix("test_").replace("_", " ")
    name = question if detail == question else f"{question}, {detail}"
    benchmark.group = name
    return Contest(benchmark, name, request.config.stash[_ROWS], benchmark.disabled)


@pytest.fixture(autouse=True)
def _where_it_fits(request, pytestconfig) -> None:
    """Skips what a CPU can't do in reasonable time, unless everything is small anyway."""
    if machine.device().type == "cuda" or pytestconfig.getoption("benchmark_disable"):
        return
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if not all(getattr(value, "on_cpu", True) for value in parameters.values()):
        pytestconfig.stash[_LEFT].append(request.node.name)
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
    config = session.config
    path, rows = config.getoption("--results"), config.stash[_ROWS]
    if path is None or not rows:
        return
    command = os.environ.get("MENDFAST_BENCHMARK_COMMAND") or "pytest " + " ".join(config.invocation_params.args)
    result = {
        "format": "mendfast.benchmarks",
        "format_version": 1,
        "machine": machine.describe(command),
        "need_a_gpu": config.stash[_LEFT],
        "failed": session.testsfailed,
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
