"""Which tokens an edit is made of: all that the loss reaches, or those that predict its target."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import make_model
from small_architectures import build
from test_chat import chatty, model  # noqa: F401
from test_forms import FACTS, assert_same, editor_of

from mendfast import EditMemory, MendConfig, MendEditor
from mendfast.base_model import small_t5
from mendfast.cli import read


def answering(editor: MendEditor) -> MendEditor:
    editor.config = replace(editor.config, rows="answers")
    return editor


@pytest.mark.parametrize("aggregation", ["sum", "least_squares"])
def test_the_others_are_left_out_and_these_are_as_they_were(chatty, model, aggregation):  # noqa: F811
    editor = editor_of(model, chatty, ["chat"], aggregation)
    batch = editor.tokenize_edits(FACTS)
    every = editor.gradients(batch)
    answers = answering(editor).gradients(batch)
    keep = batch["labels"][:, 1:] != -100  # position s predicts token s + 1
    for name, (u, delta) in answers.items():
        torch.testing.assert_close(u, every[name][0], rtol=0, atol=0)
        torch.testing.assert_close(delta[:, :-1][keep], every[name][1][:, :-1][keep], rtol=0, atol=0)
        assert not delta[:, :-1][~keep].any() and not delta[:, -1].any()
    assert any(bool(delta[:, :-1][~keep].any()) for _, delta in every.values())
    rows = editor.wanted(batch)
    assert all(len(r.sample) == int(keep.sum()) for r in rows.values())


def test_an_edit_of_several_is_one_of_a_memory(chatty, model):  # noqa: F811
    editor = answering(editor_of(model, chatty))
    memory = EditMemory(editor)
    memory.add(FACTS)
    assert_same(memory.edit(), editor.edit(FACTS))


def test_a_memory_of_all_rows_is_not_one_of_answers(chatty, model, tmp_path):  # noqa: F811
    editor = editor_of(model, chatty)
    memory = EditMemory(editor)
    memory.add(FACTS[:1])
    memory.save(tmp_path / "kept.mend")
    with pytest.raises(ValueError, match="editor"):
        EditMemory.load(tmp_path / "kept.mend", answering(editor_of(model, chatty)))


def test_it_is_saved_with_the_editor_and_asked_for_in_training(chatty, model, tmp_path):  # noqa: F811
    answering(editor_of(model, chatty)).save_pretrained(tmp_path)
    assert MendEditor.from_pretrained(tmp_path, model, chatty).config.rows == "answers"
    settings = read(["train", "--output", str(tmp_path / "run"), "--rows", "answers"]).settings
    assert settings.editor_config(append_eos=False).rows == "answers"


def test_what_has_no_such_tokens_is_refused():
    with pytest.raises(ValueError, match="rows is 'some'"):
        MendConfig(rows="some")
    t5 = small_t5(60, width=16, depth=2, heads=2)
    decoders = MendEditor.from_model(t5, config=MendConfig(rank=2, rows="answers", layers=[
        "decoder.block.1.layer.2.DenseReluDense.wo.weight"
    ]))  # fmt: skip
    assert decoders.config.rows == "answers"
    with pytest.raises(ValueError, match="only reads the prompt"):
        MendEditor.from_model(t5, config=MendConfig(rank=2, rows="answers", layers=[
            "encoder.block.1.layer.1.DenseReluDense.wo.weight"
        ]))  # fmt: skip
    with pytest.raises(ValueError, match="of a classifier use rows='all'"):
        MendEditor.from_model(make_model("bert"), config=MendConfig(rank=2, rows="answers"))
    moe = build("mixtral", "MixtralForCausalLM", "causal")
    with pytest.raises(ValueError, match="sees some of the tokens"):
        MendEditor.from_model(moe, config=MendConfig(rank=2, rows="answers", layers=[
            "model.layers.1.mlp.experts.down_proj[0]"
        ]))  # fmt: skip
