"""python -m tests.fuzz --seconds 3600: mutated files for as long as asked, and figures."""

from __future__ import annotations

import argparse
import faulthandler
import sys
import time
from pathlib import Path

from . import files


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--only", nargs="*", help="kinds of files; all by default")
    parser.add_argument("--keep", type=Path, help="a folder for the files that failed")
    arguments = parser.parse_args()
    faulthandler.enable()
    figures = files.run(arguments.seconds, arguments.seed, arguments.keep, arguments.only)
    failed = len(figures.failures)
    print(f"seed {arguments.seed}: {figures.files:,} files, {figures.refused:,} refused, {failed} failed")
    print(", ".join(f"{name} {count:,}" for name, count in figures.by_kind.items()))
    print(
        f"slowest {figures.slowest:.2f} s of CPU time, largest growth {figures.largest_growth / 2**20:.0f} MB, "
        f"longest sentence {figures.longest} characters"
    )
    print("\n".join(figures.failures))
    return bool(figures.failures)


if __name__ == "__main__":
    sys.exit(main())
