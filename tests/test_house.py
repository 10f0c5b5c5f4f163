"""The rules of the house: files that can be read in one sitting, imports that go downwards, one version."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mendfast

ROOT = Path(__file__).parents[1]
MOST_LINES = 500
SOURCES = ("*.py", "*.cu", "*.cuh", "*.cpp", "*.h")


def tracked(*patterns: str) -> list[Path]:
    """The checkout's own files; what git ignores, or an environment within it holds, is none."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", *patterns], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("this is no checkout of git, which knows the project's own files")
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def imports(path: Path) -> list[tuple[str, int]]:
    """(module, dots before it) of every import in a file, those within functions too."""
    found: list[tuple[str, int]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, 0) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.module, node.level)] if node.module else [(a.name, node.level) for a in node.names]
    return found


def test_no_file_is_too_long():
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in tracked(*SOURCES)}
    long = {str(path): lines for path, lines in lengths.items() if lines > MOST_LINES}
    assert lengths and not long, f"over {MOST_LINES} lines, so each asks to be two: {long}"


def test_imports_go_downwards():
    """The contracts in pyproject.toml: layers, and no circles."""
    pytest.importorskip("importlinter", reason="import-linter comes with the test extra")
    command = [sys.executable, "-c", "import sys; from importlinter.cli import lint_imports_command as run; run()"]
    done = subprocess.run([*command, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_kernels_know_nothing_of_what_calls_them():
    """kernels/ lies where import-linter does not find it: of mendfast it may import its types, and only ops use it."""
    allowed = {"types", "reference"}
    for path in sorted((ROOT / "kernels").glob("*.py")):
        for module, dots in imports(path):
            outside = module.split(".")[0] if dots == 2 else module.removeprefix("mendfast.").split(".")[0]
            if dots == 2 or (dots == 0 and module.split(".")[0] == "mendfast" and outside != "kernels"):
                assert outside in allowed, f"{path.name} imports mendfast.{outside}"
    for path in sorted((ROOT / "mendfast").rglob("*.py")):
        if path.parent != ROOT / "mendfast" / "ops":
            used = [module for module, dots in imports(path) if re.match(r"(mendfast\.)?kernels\b", module)]
            assert not used, f"{path.relative_to(ROOT)} imports {used[0]}; only mendfast/ops/ may"


def test_one_version():
    """pyproject.toml has no version of its own, the change log and the citation name the package's."""
    assert not re.search(r'^version = "', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    released = mendfast.__version__
    assert f"## [{released}]" in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {released}\n" in (ROOT / "CITATION.cff").read_text()
