"""Which blocks to edit: candidates, what is measured in them, and the command."""

from __future__ import annotations

import json
import math

import pytest
import torch
from test_training import facts

from mendfast import MendConfig, MendEditor
from mendfast.base_model import fit_base_model, small_gpt2, small_t5, train_tokenizer
from mendfast.cli import main
from mendfast.commands.locate import layers_from
from mendfast.locate import STRENGTH, Case, _energy, candidates, locate

PAIRS = [(wording, item.answer) for item in facts()[:24] for wording in item.wordings]


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    tokenizer = train_tokenizer([prompt for prompt, _ in PAIRS], 320)
    model = small_gpt2(len(tokenizer), width=64, depth=4, heads=2)
    fit_base_model(model, tokenizer, PAIRS, steps=120, batch_size=32, progress=False)
    return model, tokenizer


def test_candidates_are_runs_of_blocks(base):
    assert [c.blocks for c in candidates(base[0], 2)] == ["0 to 1", "2 to 3"]
    assert [c.blocks for c in candidates(base[0], 3, 1)] == ["0 to 2", "1 to 3"]
    assert [c.blocks for c in candidates(base[0], 1)] == ["0", "1", "2", "3"]
    assert candidates(base[0], 1)[1].layers == [f"transformer.h.1.mlp.{n}.weight" for n in ("c_fc", "c_proj")]
    assert candidates(base[0], 9)[0].blocks == "0 to 3"
    both = candidates(small_t5(64, width=32, depth=2, heads=2), 2)
    assert {c.blocks for c in both} == {"encoder.block: 0 to 1", "decoder.block: 0 to 1"}


def test_the_energy_is_that_of_the_gradients(base):
    editor = MendEditor.from_model(*base, MendConfig(rank=1, layers=candidates(base[0], 2)[1].layers))
    batch = editor.tokenize(PAIRS[:3])
    total = 0.0
    for layer in editor.layers:
        layer.weight.requires_grad_(True)
    for i in range(3):
        loss = base[0](**{name: value[i : i + 1] for name, value in batch.items()}).loss
        grads = torch.autograd.grad(loss, [layer.weight for layer in editor.layers])
        total += sum(float(g.double().square().sum()) for g in grads)
    for layer in editor.layers:
        layer.weight.requires_grad_(False)
    assert _energy(editor.gradients(batch)) == pytest.approx(total / 3, rel=1e-4)


def test_edits_of_equal_strength(base):
    items = facts()
    cases = [Case(i.wordings[0], items[(n + 5) % 24].answer, i.wordings[1]) for n, i in enumerate(items[:3])]
    before = {name: parameter.clone() for name, parameter in base[0].named_parameters()}
    unrelated = [(item.wordings[0], item.answer) for item in items[12:16]]
    found = locate(*base, cases, [(item.wordings[0], item.answer) for item in items[4:12]], unrelated, progress=False,
                   among=candidates(base[0], 2))  # fmt: skip
    assert [one.blocks for one in found] == ["0 to 1", "2 to 3"]
    for one in found:
        assert all(map(math.isfinite, (one.energy, one.step_size, one.loss))) and one.energy > 0 and one.kl > 0
        assert one.loss == one.rephrased_nll + one.kl and 0 <= one.reached <= 1
    assert max(one.reached for one in found) == 1.0, f"none brought its own question to {STRENGTH}"
    assert all(torch.equal(parameter, before[name]) for name, parameter in base[0].named_parameters())
    with pytest.raises(ValueError, match="nothing to measure with"):
        locate(*base, [], ["text"], unrelated)


def test_the_command_writes_what_train_takes(base, tmp_path, capsys):
    model, data, out = tmp_path / "model", tmp_path / "qa.tsv", tmp_path / "layers.json"
    for part in base:
        part.save_pretrained(model)
    data.write_text("".join(f"{item.wordings[0]}\t{item.answer}\n" for item in facts()))
    options = ["--model", str(model), "--data", str(data), "--edits", "2", "--span", "1", "--stride", "2"]
    assert main(["locate", *options, "--out", str(out)]) == 0
    said, written = capsys.readouterr().out, json.loads(out.read_text())
    assert f"--layers-from{out}" in "".join(said.split())
    assert [one["blocks"] for one in written["candidates"]] == ["1", "3"] and written["last_blocks"] == "3"
    assert written["layers"] == layers_from(str(out)) and out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    train = ["train", "--model", str(model), "--data", str(data), "--output", str(tmp_path / "run"), "--rank", "4"]
    assert main([*train, "--layers-from", str(out), "--dry-run", "--json", str(tmp_path / "plan.json")]) == 0
    assert json.loads((tmp_path / "plan.json").read_text())["layers"] == written["layers"]
    out.write_text("[]")
    assert main([*train, "--layers-from", str(out)]) == 2
    assert main(["locate", *options, "--out", str(tmp_path / "layers.txt")]) == 2
    assert "ends in .json" in capsys.readouterr().err
