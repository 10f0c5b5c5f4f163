"""A budget of mutated files on every run; ``python -m tests.fuzz --seconds 3600`` goes on for longer."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("resource", reason="peak memory is asked of getrusage, which this system lacks")

from tests.fuzz import files  # noqa: E402

SECONDS = float(os.environ.get("MENDFAST_FUZZ_SECONDS", 20))


def test_whole_files_are_taken(tmp_path):
    place = tmp_path / "case"
    place.mkdir()
    (tmp_path / "made").mkdir()
    for name, kind in files.kinds(tmp_path / "made").items():
        path = place / kind.suffix
        path.write_bytes(kind.seeds[0])
        kind.read(path)
        assert path.is_file(), name


def test_mutated_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    figures = files.run(SECONDS, seed=int(os.environ.get("MENDFAST_FUZZ_SEED", 0)), keep=tmp_path / "failed")
    assert not figures.failures, "\n".join(figures.failures)
    assert figures.files > 20 * SECONDS and figures.refused > figures.files / 4, figures
    assert not list(tmp_path.glob("fuzz-was-run*"))
