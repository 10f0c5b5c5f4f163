"""Every script in examples/ runs, as a reader would run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SAYS = {
    "compare_systems": "untrained editor",
    "edit_a_model": "Nairobi      -> Oslo",
    "from_easyedit": "2 sequential edits are left",
    "knowledge_base": "What is the capital of Kenya? -> Lima",
    "many_edits": "least squares",
    "serve_an_edit": "vllm serve",
    "train_on_your_facts": "validation: edit success",
}


def test_each_is_short_and_says_something():
    assert {path.stem for path in EXAMPLES} == set(SAYS)
    assert all(len(path.read_text().splitlines()) < 60 for path in EXAMPLES)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example, tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, example], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert SAYS[example.stem] in done.stdout, done.stdout
    assert not any(tmp_path.iterdir()), "an example leaves files where it is run"
