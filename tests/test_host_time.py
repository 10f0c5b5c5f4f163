"""An edit beside its arithmetic: a GPU is asked as often for many layers as for few, and nothing is done twice."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from conftest import make_batch, make_model
from test_editor import SMALL
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mendfast import MendConfig, MendEditor
from mendfast.aggregate import grouped
from mendfast.choice import stacks
from mendfast.layers import derives, walk
from mendfast.types import modules_of
from mendfast.updates import _KEPT, _made, checksum, measured

READS = ("aten._local_scalar_dense.default", "aten.bincount.default", "aten.equal.default")
"""For which the host waits, whatever the device; what is read off the device in one copy may then be read at will."""


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count[str(function)] += 1
        return function(*args, **(kwargs or {}))

    @property
    def reads(self) -> int:
        return sum(self.count[name] for name in READS)


@pytest.mark.parametrize("rows", ["all", "answers"])
def test_more_layers_are_no_more_waits(rows):
    found = {}
    for blocks in ([0], [0, 1]):
        model = make_model("llama")
        names = [f"model.layers.{i}.mlp.{side}_proj" for i in blocks for side in ("up", "down")]
        editor = MendEditor.from_model(model, None, MendConfig(**SMALL, layers=names, rows=rows))
        batch = make_batch("llama")
        editor.edit_tokens(make_batch("llama", seed=1)).apply_(model).revert_(model)
        with Calls() as making:
            edit = editor.edit_tokens(batch)
        with Calls() as applying:
            edit.apply_(model)
        with Calls() as reverting:
            edit.revert_(model)
        found[len(names)] = making.reads, applying.reads, reverting.reads
    assert found[2] == found[4]


def test_an_edit_that_is_applied_at_once_does_not_look_at_the_model_again():
    model = make_model("gpt2")
    edit = MendEditor.from_model(model, None, MendConfig(**SMALL)).edit_tokens(make_batch("gpt2"))
    with Calls() as calls:
        edit.layers_of(model)
    assert not calls.count["aten.index.Tensor"] and not calls.reads
    with torch.no_grad():
        model.transformer.wte.weight.mul_(2)
    with Calls() as calls:
        edit.layers_of(model)
    assert calls.count["aten.index.Tensor"] == len(edit.fingerprint.samples)
    assert not calls.count["aten.arange.start"]  # the places are kept


def test_one_group_is_its_rows():
    rows, sample = torch.randn(6, 3), torch.tensor([2, 0, 1, 0, 2, 1])
    (alone,) = grouped(sample, 1 << 62, 1, rows)
    assert alone.data_ptr() == rows.data_ptr()
    both = grouped(sample, 3, 2, rows)[0]  # the second has none
    assert torch.equal(alone[0], rows) and torch.equal(both[0], rows) and not both[1].any()


class Shared(nn.Module):
    """Two stacks that hold one block, and the first of them a second time."""

    def __init__(self):
        super().__init__()
        first, second = (nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(2))
        self.a = nn.ModuleList([first, second])
        self.again = nn.ModuleDict({"a": self.a, "none": None})
        self.b = nn.ModuleList([second, nn.Sequential(nn.Linear(2, 2))])
        second.inside = nn.ModuleList([nn.Linear(2, 2)])
        self.out = second.inside


def test_modules_are_those_of_pytorch():
    for model in (Shared(), make_model("gpt2"), make_model("t5")):
        assert modules_of(model) == list(model.modules())
        assert list(walk(model)) == list(model.named_modules())
    assert [name for name, _ in stacks(Shared())] == ["a", "b"]  # what lies in one is no other
    assert [path for path, _ in walk(Shared(), enter=lambda m: False)] == [""]


def test_classes_are_told_by_name_and_package():
    assert derives(nn.Linear, "Module", "torch") and not derives(nn.Linear, "Module", "peft")


def test_factors_are_measured_together_as_apart():
    def pair(t, m, n, dtype=torch.float32):
        return torch.randn(t, m).to(dtype), torch.randn(t, n).to(dtype), 0.5

    factors = {"a": pair(3, 8, 5), "b": pair(2, 4, 4), "c": pair(3, 8, 5), "d": pair(0, 8, 5), "e": pair(3, 8, 5)}
    factors["half"] = pair(3, 8, 5, torch.float16)
    factors["infinite"] = torch.full((1, 8), torch.inf), torch.ones(1, 5), 1.0
    digest, bounds = measured(factors)
    for (name, factor), bound in zip(factors.items(), bounds, strict=True):
        alone, (expected,) = measured({name: factor})
        assert bound == pytest.approx(expected, rel=1e-12)
        assert alone is None or alone[0] in digest
        u, delta, alpha = factor
        assert (name, int(checksum(u)), int(checksum(delta)), alpha) in digest
    assert measured({"d": factors["d"]}) == (None, [0.0])


@pytest.mark.parametrize("words", [_KEPT, _KEPT + 1])
def test_checksums_know_every_place(words):
    values = torch.zeros(words, dtype=torch.float64)
    values[-1] = 1
    blocks = words // 64 if words % 64 == 0 else words
    expected = int(values.view(torch.int64)[-1]) * int(_made(blocks, values.device)[-1])
    assert int(checksum(values)) == (expected + 2**63) % 2**64 - 2**63
