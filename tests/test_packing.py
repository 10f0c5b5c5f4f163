"""Padding left out of matrix products: the results are those of the padded batch, the rows fewer."""

from __future__ import annotations

import threading
import types
from dataclasses import replace

import pytest
import torch
from conftest import CLASSIFIER, SEQ2SEQ, make_batch, make_model
from test_editor import trained
from test_meta import gradients

from mendfast import packing
from mendfast.choice import stacks
from mendfast.objective import answer_positions
from mendfast.ops import frozen_linear
from mendfast.training import editor_loss
from mendfast.training.cache import PrefixCache


def ragged(name: str, size: int, seed: int, left: bool = False) -> dict[str, torch.Tensor]:
    """As ``make_batch``, from 5 to 20 tokens."""
    short, long = make_batch(name, size, 20, seed, left), make_batch(name, size, 20, seed + 7, left)
    for i in range(0, size, 2):
        n = 5 + i % 5
        for side in ("input_ids", "attention_mask", "labels"):
            if long[side].dim() == 2 and long[side].shape[1] == 20:
                value = torch.zeros_like(long[side][i])
                if side == "labels":
                    value.fill_(-100)
                own = short[side][i]
                rows = slice(20 - n, None) if left else slice(n)
                value[rows] = own[-n:] if left else own[:n]
                long[side][i] = value
        if long["labels"].shape == long["input_ids"].shape:
            at = slice(-3, None) if left else slice(n - 3, n)
            long["labels"][i, at] = long["input_ids"][i, at]
    return long


@pytest.fixture
def eager(monkeypatch):
    """Copying costs nothing, so that models as small as these leave padding out too."""
    monkeypatch.setattr(packing, "COPIED", 0)


@pytest.fixture
def rows(monkeypatch) -> list[int]:
    """How many rows each product of a linear layer of the model's blocks has, filled in as the model runs."""
    counts: list[int] = []
    plain = frozen_linear.forward

    def counted(layer, x, *args, **kwargs):
        counts.append(x.numel() // x.shape[-1])
        return plain(layer, x, *args, **kwargs)

    monkeypatch.setattr(frozen_linear, "forward", counted)
    return counts


def step(editor, data, **options) -> dict[str, torch.Tensor]:
    editor.zero_grad()
    total, parts = editor_loss(editor, *data, **options)
    total.backward()
    return {**gradients(editor), "total": total.detach(), **parts}


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "opt", *SEQ2SEQ, *CLASSIFIER])
@pytest.mark.parametrize(("joint", "recompute", "cached"), [(1, False, False), (2, False, True), (1, True, True),
                                                            (True, False, False)])  # fmt: skip
def test_a_packed_step_is_the_padded_one(eager, rows, name, joint, recompute, cached):
    # in float64, for the reason that test_meta.py gives
    model = make_model(name).double()
    editor = trained(model, name).double()
    data = [ragged(name, size, seed) for size, seed in ((6, 1), (6, 2), (12, 3))]
    options = {"joint": joint, "checkpoint_activations": recompute}
    cache = PrefixCache(model, editor.layers, 1 << 30) if cached else None
    if cached:
        step(editor, data, cache=cache, **options)
    rows.clear()
    plain = step(editor, data, cache=cache, pack=False, **options)
    many = sum(rows)
    rows.clear()
    split = step(editor, data, cache=cache, **options)
    assert sum(rows) < 0.95 * many
    assert set(split) == set(plain)
    for key, value in plain.items():
        assert (split[key] - value).norm() <= 1e-9 * value.norm() + 1e-14, key
    assert all("forward" not in vars(m) and not m._forward_hooks for m in model.modules())


def test_in_float32(eager):
    """To rounding, which grows with the square root of the terms of a sum; a step is some of them one after another."""
    model = make_model("gpt2")
    editor = trained(model, "gpt2")
    data = [ragged("gpt2", size, seed) for size, seed in ((6, 1), (6, 2), (12, 3))]
    plain, split = (step(editor, data, pack=pack) for pack in (False, True))
    terms = max(max(layer.shape) for layer in editor.layers) * 20
    tolerance = 16 * torch.finfo(torch.float32).eps * terms**0.5
    for key in ("total", "l_edit", "l_loc"):
        assert (split[key] - plain[key]).abs() <= tolerance * plain[key].abs() + 1e-6, key


@pytest.mark.parametrize("reduction", ["edit", "batch"])
@pytest.mark.parametrize(("positions", "answers"), [(0, True), (3, False)])
def test_with_other_losses(eager, reduction, positions, answers):
    model = make_model("llama").double()
    editor = trained(model, "llama", loss_reduction=reduction).double()
    data = [ragged("llama", size, seed) for size, seed in ((6, 1), (6, 2), (12, 3))]
    options = {"loc_positions": positions, "loc_answers": answers, "seed": 3}
    plain, split = (step(editor, data, pack=pack, **options) for pack in (False, True))
    assert all((split[key] - value).norm() <= 1e-9 * value.norm() + 1e-14 for key, value in plain.items())


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_padding_on_the_left(eager, rows, name):
    model = make_model(name).double()
    editor = trained(model, name).double()
    data = [ragged(name, size, seed, left=True) for size, seed in ((6, 1), (6, 2), (12, 3))]
    rows.clear()
    plain = step(editor, data, pack=False)
    many = sum(rows)
    split = step(editor, data)
    assert sum(rows) - many < 0.8 * many
    assert all((split[key] - value).norm() <= 1e-9 * value.norm() + 1e-14 for key, value in plain.items())


def test_every_product_has_the_real_tokens_alone(eager, rows):
    model = make_model("llama")
    editor = trained(model, "llama")
    batch = ragged("llama", 6, 1)
    rows.clear()
    with packing.packing():
        editor.gradients(batch)
    real = int(batch["attention_mask"].sum())
    labels = int((batch["labels"] != -100).sum())
    assert set(rows) <= {real, labels} and real < batch["attention_mask"].numel()
    rows.clear()
    editor.gradients(batch)  # outside of the block all is as ever
    assert real not in rows


def test_no_copies_where_they_take_longer_than_the_padding(rows):
    """Of the widths of a small model; those of a real one, with a tenth of padding, are packed."""
    editor = trained(make_model("gpt2"), "gpt2")
    batch = ragged("gpt2", 6, 1)
    rows.clear()
    with packing.packing():
        editor.gradients(batch)
    assert int(batch["attention_mask"].sum()) not in rows
    assert packing._fewer(torch.nn.Linear(576, 1536), [range(900), range(0)], 1000)
    assert not packing._fewer(torch.nn.Linear(576, 1536), [range(1000), range(0)], 1000)
    assert packing._fewer(torch.nn.Linear(576, 1536), [range(100), range(900)], 1000)


def test_other_threads_and_other_batches_are_left_alone(eager, rows):
    """A pass of another thread on a batch of the same shape is given all of its rows."""
    model = make_model("gpt2")
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]) != 0
    block = stacks(model)[0][1][0]
    found = []

    def run() -> None:
        found.append(block.mlp.c_fc(torch.ones(2, 3, 32))[mask.logical_not()].abs().sum() > 0)

    with packing.packing(), packing.packed_batch(model, mask):
        other = threading.Thread(target=run)
        other.start()
        other.join()
        run()
        longer = block.mlp.c_fc(torch.ones(2, 4, 32))
        assert longer[1, 3].equal(longer[0, 0])
    assert found == [True, False]
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "opt"])
@pytest.mark.parametrize("padded", [True, False])
def test_no_gradient_passes_the_prompts_of_an_edit_that_is_made_of_its_answer(eager, rows, name, padded):
    model = make_model(name).double()
    editor = trained(model, name).double()
    batch = ragged(name, 4, 1) if padded else make_batch(name, 4, 12, 1)
    every = editor.gradients(batch)
    answers = answer_positions(model, batch)
    assert 0 < int(answers.sum()) < int((batch["attention_mask"] != 0).sum())
    editor.config = replace(editor.config, rows="answers")
    rows.clear()
    with packing.packing():
        found = editor.gradients(batch)
    assert int(answers.sum()) in rows and min(rows) <= int(answers.sum())
    for layer, (u, delta) in found.items():
        torch.testing.assert_close(u[answers], every[layer][0][answers], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(delta[answers], every[layer][1][answers], rtol=1e-9, atol=1e-12)
        assert not delta[~answers].any()


@pytest.mark.parametrize(("shape", "on_gpu"), [((6400, 1600), False), ((16384, 4096), True)])
def test_a_gpu_packs_where_more_is_left_out_than_it_does_while_the_copies_are_launched(shape, on_gpu):
    """Of 800 tokens half are padding: 8 * 10^9 multiply-adds in GPT-2-XL's shape, 5 * 10^10 in GPT-J's."""
    kept = [torch.arange(400), torch.arange(0)]
    for is_cuda, expected in ((False, True), (True, on_gpu)):
        weight = types.SimpleNamespace(dim=lambda: 2, shape=shape, is_cuda=is_cuda)
        assert packing._fewer(types.SimpleNamespace(weight=weight), kept, 800) is expected
