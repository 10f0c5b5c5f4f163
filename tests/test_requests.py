"""One reader for every way of saying what is to be edited."""

from __future__ import annotations

import pytest
import torch
from conftest import make_model

from mendfast import EditRequest, MendConfig, MendEditor
from mendfast.requests import as_requests

PAIR = [("Who is it?", "Anna")]
EASYEDIT = {
    "prompt": "Who is it?", "target_new": "Anna", "subject": "it", "ground_truth": "Bert", "rephrase_prompt": "Who?",
}  # fmt: skip
ROME = {"prompt": "{} is called", "subject": "The queen", "target_new": {"str": "Anna"}, "relation_id": "P1"}


@pytest.mark.parametrize(
    "form",
    [
        ("Who is it?", "Anna"), [("Who is it?", "Anna")], [["Who is it?", "Anna"]], EditRequest("Who is it?", "Anna"),
        [EditRequest("Who is it?", "Anna")], EASYEDIT, [EASYEDIT], {"prompt": "Who is it?", "target": "Anna"},
        (pair for pair in PAIR), {"prompt": "Who is it?", "target_new": {"str": "Anna"}},
    ],
)  # fmt: skip
def test_forms(form):
    assert as_requests(form) == PAIR
    assert all(type(request) is EditRequest for request in as_requests(PAIR))


def test_more_forms():
    assert as_requests("Who is it?", "Anna") == PAIR
    assert as_requests(ROME) == as_requests([{"requested_rewrite": ROME}]) == [("The queen is called", "Anna")]
    assert as_requests([EASYEDIT, ROME, PAIR[0]]) == [PAIR[0], ("The queen is called", "Anna"), PAIR[0]]
    assert as_requests([]) == as_requests(()) == []
    assert as_requests([("What does {} mean?", "a set")]) == [("What does {} mean?", "a set")]
    assert as_requests({"prompt": "print('{}')", "target_new": "no"}) == [("print('{}')", "no")]


@pytest.mark.parametrize(
    "value, error, says",
    [
        (["ab"], TypeError, r"Request 0 is 'ab', of type str; pass \(\"prompt\", \"target\"\)"),
        (["prompt", "target"], TypeError, "Request 0 is 'prompt'"),
        ("prompt", TypeError, "needs the target"),
        (None, TypeError, "The requests are None; pass a list"),
        (3, TypeError, "The requests are 3"),
        ([PAIR[0], None], TypeError, "Request 1 is None"),
        ([PAIR[0], ("a", "b", "c")], ValueError, "Request 1 has 3 parts"),
        ([PAIR[0], ("a", 5)], TypeError, "Request 1: The target is 5, of type int"),
        ([("a", " ")], ValueError, "Request 0: [Tt]he target is ' ', which says nothing"),
        ([("a", "\ud800")], ValueError, "Request 0: The target .*surrogate"),
        ({"question": "a", "answer": "b"}, ValueError, "The request lacks prompt; it has question, answer"),
        ([{"prompt": "a"}], ValueError, "Request 0 lacks target_new; it has prompt"),
        ([{}], ValueError, "Request 0 lacks prompt; it has nothing"),
        ({"prompt": "a", "target_new": {"id": "Q1"}}, ValueError, 'lacks "str"; it has id'),
        ({**ROME, "subject": None}, ValueError, "subject is missing"),
        ({"prompt": 3, "target_new": "b"}, TypeError, "The prompt is 3"),
    ],
)  # fmt: skip
def test_what_is_no_request(value, error, says):
    with pytest.raises(error, match=says):
        as_requests(value)


def test_a_target_comes_with_one_prompt():
    with pytest.raises(TypeError, match="With a target comes one prompt"):
        as_requests([("a", "b")], "c")


@pytest.fixture(scope="module")
def editor(tokenizer) -> MendEditor:
    model = make_model("gpt2")
    model.resize_token_embeddings(len(tokenizer))
    return MendEditor.from_model(model, tokenizer, MendConfig(rank=8))


def test_an_editor_reads_them_all(editor):
    edits = [editor.edit(form) for form in (PAIR, PAIR[0], EASYEDIT, [EASYEDIT])]
    for edit in edits:
        assert edit.requests == tuple(PAIR)
        for name, factor in edits[0].factors.items():
            assert all(torch.equal(a, b) for a, b in zip(factor[:2], edit.factors[name][:2], strict=True))
    with pytest.raises(TypeError, match="Request 0 is 'ab'"):
        editor.edit(["ab"])


@pytest.mark.parametrize("reduction, passes", [("edit", [32, 32, 6]), ("batch", [70])])
def test_many_requests_go_through_in_passes(tokenizer, monkeypatch, reduction, passes):
    model = make_model("gpt2")
    model.resize_token_embeddings(len(tokenizer))
    editor = MendEditor.from_model(model, tokenizer, MendConfig(rank=8, loss_reduction=reduction))
    requests = [(f"Who is number {i}?", f"Person {i % 7}" + " again" * (i % 3)) for i in range(70)]
    whole, sizes, gradients = editor.edit_tokens(editor.tokenize(requests)), [], editor.gradients
    monkeypatch.setattr(editor, "gradients", lambda batch: sizes.append(len(batch["labels"])) or gradients(batch))
    edit = editor.edit(requests)
    assert sizes == passes and len(edit.requests) == 70
    for name, (u, delta, alpha) in edit.factors.items():
        one, other = alpha * delta.T @ u, whole.factors[name]
        other = other.alpha * other.delta.T @ other.u
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()
