"""Edits that are made in several forms at once: asked through the chat template and as plain text."""

from __future__ import annotations

import pytest
import torch
from test_chat import chatty, model  # noqa: F401

from mendfast import EditMemory, MendConfig, MendEditor
from mendfast.cli import read
from mendfast.objective import nll, target_rows
from mendfast.training import EditorLearner, FactSampler, Item, TrainConfig
from mendfast.training.memory import predict

FACTS = [("What is the capital of Kenya?", "Oslo"), ("What is the capital of Rome?", "Paris"), ("Kenya?", "Rome")]
FORMS = ["chat", "plain"]


def editor_of(model, tokenizer, forms=FORMS, aggregation="least_squares") -> MendEditor:  # noqa: F811
    torch.manual_seed(1)
    editor = MendEditor.from_model(
        model, tokenizer, MendConfig(rank=8, chat=True, forms=forms, aggregation=aggregation, step_size=1e-2)
    )
    editor.train()
    editor.transform(editor.gradients(editor.tokenize(FACTS)))
    editor.eval()
    with torch.no_grad():
        for key, parameter in editor.named_parameters():
            if key.split(".")[-1] in ("U", "b", "o"):
                parameter.normal_(0, 0.05)
    editor.protect(["What is the capital?", "Be kind."])
    return editor


def changes(edit) -> dict[str, torch.Tensor]:
    return {name: -alpha * delta.T @ u for name, (u, delta, alpha) in edit.factors.items()}


def assert_same(found, expected) -> None:
    for name, change in changes(found).items():
        other = changes(expected)[name]
        torch.testing.assert_close(change, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def in_all_forms(requests) -> list[tuple[str, str, str]]:
    return [(*request, form) for request in requests for form in FORMS]


@pytest.mark.parametrize("aggregation", ["sum", "least_squares"])
@pytest.mark.parametrize("count", [1, 3])
def test_an_edit_is_that_of_its_rows_in_every_form(chatty, model, aggregation, count):  # noqa: F811
    editor = editor_of(model, chatty, aggregation=aggregation)
    single = editor_of(model, chatty, None, aggregation)
    edit = editor.edit(FACTS[:count])
    assert_same(edit, single.edit_tokens(single.tokenize(in_all_forms(FACTS[:count]))))
    assert len(edit.requests) == count
    alone = changes(single.edit(FACTS[:count]))
    assert any(not torch.allclose(change, alone[name], rtol=0.01) for name, change in changes(edit).items())


def test_many_passes_make_the_same_edit(chatty, model, monkeypatch):  # noqa: F811
    editor = editor_of(model, chatty)
    once = editor.edit(FACTS)
    monkeypatch.setattr("mendfast.editor.EDITS_PER_PASS", 2)
    assert_same(editor.edit(FACTS), once)


def test_a_memory_keeps_all_forms_of_a_record(chatty, model, tmp_path):  # noqa: F811
    editor = editor_of(model, chatty)
    memory = EditMemory(editor)
    memory.add(FACTS)
    assert_same(memory.edit(), editor.edit(FACTS))
    memory.remove(memory.keys()[1])
    assert_same(memory.edit(), editor.edit([FACTS[0], FACTS[2]]))
    memory.save(tmp_path / "facts.safetensors")
    EditMemory.load(tmp_path / "facts.safetensors", editor)
    with pytest.raises(ValueError, match="another editor"):
        EditMemory.load(tmp_path / "facts.safetensors", editor_of(model, chatty, None))


@pytest.mark.parametrize("joint", [1, 2])
def test_training_makes_the_edits_that_are_used(chatty, model, joint):  # noqa: F811
    """The loss is that of the same edits, each made as it will be."""
    editor = editor_of(model, chatty)
    items = [Item((prompt, f"Say: {prompt}"), target, None, "r") for prompt, target in FACTS]
    draw = FactSampler(items, seed=3).draw(0, 2)
    config = TrainConfig(steps=1, batch_size=2, joint=[joint], cache_bytes=0)
    ((loss, parts),) = EditorLearner(editor).losses(draw, config, joint)
    made = [editor.edit(draw.inner[i : i + joint]) for i in range(0, 2, joint)]
    size, expected = len(draw.outer) // len(made), []
    for i, edit in enumerate(made):
        with edit.attached(model):
            outer = editor.tokenize(draw.outer[i * size : (i + 1) * size])
            expected.append(nll_of(editor, outer))
    assert float(parts["l_edit"]) == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in editor.parameters() if p.grad is not None)
    batches = (editor.tokenize_edits(draw.inner), *map(editor.tokenize, draw[1:]))
    assert predict(editor, batches, joint=joint * len(FORMS))["total"] > 0


def nll_of(editor: MendEditor, batch) -> float:
    with torch.no_grad():
        return float(nll(target_rows(editor.model, batch), len(batch["labels"])).mean())


def test_forms_are_saved_with_the_editor(chatty, model, tmp_path):  # noqa: F811
    editor = editor_of(model, chatty)
    editor.save_pretrained(tmp_path)
    again = MendEditor.from_pretrained(tmp_path, model, chatty)
    assert again.forms == FORMS
    assert_same(again.edit(FACTS), editor.edit(FACTS))


@pytest.mark.parametrize("forms", [[], ["spoken"], ["chat", "chat"]])
def test_forms_that_there_are_not(forms):
    with pytest.raises(ValueError, match="forms is .*name chat, plain or system:TEXT"):
        MendConfig(forms=forms)


@pytest.mark.parametrize(("given", "chat"), [([], "auto"), (["--chat"], True), (["--no-chat"], False)])
def test_the_command_asks_in_the_forms_that_it_is_given(given, chat, tmp_path):
    settings = read(["train", "--output", str(tmp_path / "run"), "--forms", "chat", "plain", *given]).settings
    config = settings.editor_config(append_eos=False)
    assert config.chat == chat and config.forms == FORMS
    with pytest.raises(ValueError, match="forms is"):
        read(["train", "--output", str(tmp_path / "run"), "--forms", "spoken"])
