"""Time everything that this machine can run, and keep it: ``python -m benchmarks.run``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from . import machine

HERE = Path(__file__).parent


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__,
        epilog="Example: python -m benchmarks.run --only 'bench_edit.py or bench_meta_step.py' --output mine",
    )
    parser.add_argument("--only", metavar="EXPRESSION", help="benchmarks whose names match, as pytest -k takes it")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder (default benchmarks/results)")
    parser.add_argument("--notes", default="", help="what a reader should know of the circumstances")
    parser.add_argument("--resume", action="store_true", help="leave out what the file holds of the same commit")
    args = parser.parse_args(argv)
    os.environ["MENDFAST_BENCHMARK_NOTES"] = args.notes
    given = [f"--only '{args.only}'"] if args.only else []
    os.environ["MENDFAST_BENCHMARK_COMMAND"] = " ".join(["python -m benchmarks.run", *given])
    name = machine.result_name(machine.describe(""))
    command = [str(HERE), "--benchmark-only", "-q", f"--results={args.output / name}", "-p", "no:cacheprovider"]
    command += ["-k", args.only] if args.only else []
    args.output.mkdir(parents=True, exist_ok=True)
    return int(pytest.main(command + ["--resume"] * args.resume))


if __name__ == "__main__":
    sys.exit(main())
