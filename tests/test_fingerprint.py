"""An editor or an edit for other weights of the same shape is noticed; rounding and our own edits are not."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
from conftest import make_batch, make_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from mendfast import Edit, MendConfig, MendEditor, editors
from mendfast.choice import find_layers
from mendfast.cli import main
from mendfast.commands.loading import shipped_for
from mendfast.demo.build import ASSETS
from mendfast.fingerprint import SAMPLES, Fingerprint, fingerprint_of

CONFIG = MendConfig(rank=4, step_size=0.05)


def taken(model: torch.nn.Module) -> Fingerprint:
    return fingerprint_of(model, find_layers(model, None))


def tuned(model: torch.nn.Module, amount: float) -> torch.nn.Module:
    """A fine-tuned copy: every weight moved by ``amount`` of the weights' size."""
    other = copy.deepcopy(model)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += amount * parameter.std(correction=0) * torch.randn_like(parameter)
    return other


def test_rounding_is_no_other_model(architecture):
    model = make_model(architecture)
    found = taken(model)
    assert len(found.samples) >= 8
    for dtypes in ([torch.bfloat16], [torch.float16], [torch.float16, torch.bfloat16], [torch.bfloat16, torch.float32]):
        other = copy.deepcopy(model)
        for dtype in dtypes:
            other.to(dtype)
        assert found.distance(other) == 0
        assert taken(other).distance(model) == 0


def test_another_model_is_told_from_it(architecture):
    model = make_model(architecture)
    found = taken(model)
    assert found.distance(make_model(architecture, seed=1)) > 0.5
    assert 0 < found.distance(tuned(model, 1e-2)) < 0.1
    assert found.distance(tuned(model, 2e-3)) > 0
    assert found.distance(tuned(model, 1e-2).bfloat16()) > 0


@pytest.mark.parametrize("backup", ["cpu", "none"])
def test_our_own_edits_are_left_out(backup):
    model = make_model("llama")
    editor = MendEditor.from_model(model, None, MendConfig(rank=4, step_size=10.0))
    edit = editor.edit_tokens(make_batch("llama"))
    found = edit.fingerprint
    edit.apply_(model, backup=backup)
    assert found.distance(model) == 0
    assert editor.edit_tokens(make_batch("llama", seed=1)).fingerprint == found
    assert taken(copy.deepcopy(model)) == found or backup == "none"


def test_weights_applied_without_us_are_another_model():
    model = make_model("llama")
    found = taken(model)
    with torch.no_grad():
        for layer in find_layers(model, None):
            layer.weight.add_(0.01 * torch.randn_like(layer.weight))
    assert found.distance(model) > 0


def test_an_editor_for_another_model(tmp_path, caplog):
    model = make_model("llama")
    model.config._name_or_path = "/somewhere/base-1b"
    other = tuned(model, 1e-2)
    other.config._name_or_path = "org/base-1b-instruct"
    MendEditor.from_model(model, None, CONFIG).save_pretrained(tmp_path)
    assert b"somewhere" not in (tmp_path / "editor.safetensors").read_bytes()
    with caplog.at_level(logging.WARNING, "mendfast"):
        assert MendEditor.from_pretrained(tmp_path, model, strict=True).fingerprint == taken(model)
        assert not caplog.text
        editor = MendEditor.from_pretrained(tmp_path, other)
    for word in ("base-1b (llama)", "base-1b-instruct (llama)", "differ by 0.0"):
        assert word in caplog.text
    with pytest.raises(ValueError, match="was made for base-1b .llama., and this model, base-1b-instruct"):
        MendEditor.from_pretrained(tmp_path, other, strict=True)
    editor.save_pretrained(tmp_path / "again")  # it was not trained for the other one by being loaded there
    with pytest.raises(ValueError, match="other weights"):
        MendEditor.from_pretrained(tmp_path / "again", other, strict=True)


def test_an_edit_for_another_model(tmp_path, caplog):
    model = make_model("llama")
    other = tuned(model, 1e-2)
    MendEditor.from_model(model, None, CONFIG).edit_tokens(make_batch("llama")).save(tmp_path / "edit")
    edit = Edit.load(tmp_path / "edit")
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError, match="This edit was made for"):
        edit.apply_(other, strict=True)
    with pytest.raises(ValueError, match="This edit was made for"), edit.attached(other, strict=True):
        pass
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    caplog.clear()
    with caplog.at_level(logging.WARNING, "mendfast"):
        edit.apply_(model, strict=True)
        assert not caplog.text
        for _ in range(3):
            with edit.attached(other):
                pass
        edit.apply_(other)
    assert caplog.text.count("This edit was made for") == 1  # said once for each model


def test_files_are_small_deterministic_and_read_back(tmp_path):
    edit = MendEditor.from_model(make_model("gpt2"), None, CONFIG).edit_tokens(make_batch("gpt2"))
    for name in "ab":
        edit.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    loaded = Edit.load(tmp_path / "a")
    assert loaded.fingerprint == edit.fingerprint and loaded.to("cpu").fingerprint == edit.fingerprint
    assert len(edit.fingerprint.to_json()) < 200 * len(edit.fingerprint.samples)
    assert Edit.sum([edit, loaded]).fingerprint == edit.fingerprint


def test_files_without_a_fingerprint_load_without_a_word(tmp_path, caplog):
    model = make_model("llama")
    edit = MendEditor.from_model(model, None, CONFIG).edit_tokens(make_batch("llama"))
    Edit(edit.factors, "llama").save(tmp_path / "edit")
    MendEditor.from_model(model, None, CONFIG).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "editor.safetensors")
    kept = {"format": "mendfast.editor", "format_version": "1", "model_type": "llama"}
    save_file(tensors, tmp_path / "editor.safetensors", kept)
    caplog.clear()
    with caplog.at_level(logging.INFO, "mendfast"):
        old = Edit.load(tmp_path / "edit")
        old.apply_(make_model("llama", seed=1), strict=True)
        editor = MendEditor.from_pretrained(tmp_path, make_model("llama", seed=1), strict=True)
    assert old.fingerprint is None and editor.fingerprint is None and not caplog.text


def test_summing_edits_of_different_models_is_said(caplog):
    edits = [
        MendEditor.from_model(model, None, CONFIG).edit_tokens(make_batch("llama"))
        for model in (make_model("llama"), make_model("llama", seed=1))
    ]
    with caplog.at_level(logging.WARNING, "mendfast"):
        Edit.sum(edits)
    assert "made for different weights" in caplog.text


def test_more_tokens_make_no_other_model():
    model = make_model("llama")
    found = taken(model)
    model.resize_token_embeddings(128, mean_resizing=False)
    assert found.distance(model) == 0


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "null", '{"name": 1, "model_type": "", "weights": {}}', "[" * 100_000,
     json.dumps({"name": "", "model_type": "", "weights": {"a.weight": [2, 2, "AAAA"]}}),
     json.dumps({"name": "", "model_type": "", "weights": {"a.weight": [2, -2, "AA" * SAMPLES]}}),
     json.dumps({"name": "", "model_type": "", "weights": {"a.weight": 3}})],
)  # fmt: skip
def test_a_damaged_fingerprint_gets_a_sentence(text):
    with pytest.raises(ValueError, match="file: the fingerprint of its base model is"):
        Fingerprint.from_json(text, "file")


def test_the_editor_that_ships_is_found_by_the_models_weights(tmp_path, monkeypatch, capsys):
    """Whatever the model is called, and not for another of its shape."""
    monkeypatch.setattr(editors, "HERE", tmp_path / "editors")
    model = make_model("llama")
    assert shipped_for(model) is None
    MendEditor.from_model(make_model("gpt2"), None, CONFIG).save_pretrained(editors.HERE / "another")
    MendEditor.from_model(model, None, CONFIG).save_pretrained(editors.HERE / "fits")
    assert shipped_for(copy.deepcopy(model).bfloat16()) == "fits"
    assert shipped_for(tuned(model, 0.01)) is None
    tuned(model, 0.01).save_pretrained(tmp_path / "tuned")
    AutoTokenizer.from_pretrained(ASSETS / "model").save_pretrained(tmp_path / "tuned")
    assert main(["edit", "--model", str(tmp_path / "tuned"), "--prompt", "Who?", "--target", "Me"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "No editor ships for" in said and "another, fits" in said and "--editor" in said
