"""How long does it take to import the package, and to load an editor?"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from mendfast import MendEditor
from mendfast.editor import WEIGHTS_FILE

from .bench_edit import _editor
from .cases import cases

EDITORS = cases((1,), typical=1, cpu=(1,), cpu_others=False)


def test_import(contest):
    """A fresh interpreter that imports mendfast; beside it one that imports what mendfast builds on."""

    def python(code: str):
        return lambda _: subprocess.run([sys.executable, "-c", code], check=True)

    contestants = {
        "mendfast": python("import mendfast"),
        "its dependencies": python("import torch, safetensors.torch, numpy"),
    }
    contest({"shape": "-"}, lambda seed: None, contestants, reference=None, memory=False)


@pytest.mark.parametrize("case", EDITORS, ids=str)
def test_editor(contest, case, tmp_path):
    """``MendEditor.from_pretrained``; beside it the reading of the file's tensors alone."""
    _, editor, _ = _editor(contest, case)
    editor.save_pretrained(tmp_path)
    size = (tmp_path / WEIGHTS_FILE).stat().st_size
    loaded = MendEditor.from_pretrained(tmp_path, editor.model).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in editor.state_dict().items())

    def read(_) -> list[torch.Tensor]:
        return [value.clone() for value in load_file(tmp_path / WEIGHTS_FILE, device=contest.device.type).values()]

    contestants = {
        "mendfast": lambda _: MendEditor.from_pretrained(tmp_path, editor.model),
        "safetensors alone": read,
    }
    row = {"shape": case.shape.name, "megabytes": round(size / 1e6)}
    contest(row, lambda seed: None, contestants, reference=None)
