"""Many texts through a model as one tree: the rows of plain passes, of fewer tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import CAUSAL, VOCAB, make_model
from test_chat import chatty, model  # noqa: F401
from test_editor import trained
from test_forms import FACTS, editor_of

import mendfast.editor
from mendfast import EditMemory, MendConfig, MendEditor
from mendfast.labels import collate
from mendfast.tree import NotServed, Tree, answers_through, regular, why_not, why_not_tried

NOT_SERVED = {"gpt_neo": "windows|scaled_dot", "mistral": "windows"}


def batch_of(texts: int = 9) -> dict[str, torch.Tensor]:
    """Prompts that begin alike, one that begins another, one twice with another answer, and gaps in the labels."""
    generator = torch.Generator().manual_seed(3)

    def some(count: int) -> list[int]:
        return torch.randint(3, VOCAB, (count,), generator=generator).tolist()

    system, relations = some(5), [some(3), some(3)]
    prompts = [system + relations[i % 2] + some(1 + i % 4) for i in range(texts - 3)]
    prompts += [prompts[0], prompts[1] + some(2), some(1)]
    examples = []
    for i, prompt in enumerate(prompts):
        answer = some(1 + i % 3)
        labels = [-100] * len(prompt) + answer
        if len(answer) == 3:
            labels[-2] = -100
        ids = prompt + answer
        examples.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return collate(examples, pad_token_id=0)


@pytest.mark.parametrize("name", [*CAUSAL])
def test_rows_are_those_of_plain_passes(name):
    small = make_model(name)
    editor = trained(small, name)
    editor.config = replace(editor.config, rows="answers")
    batch = batch_of()
    problem = why_not(small, editor.layers, batch["labels"].shape[1]) or why_not_tried(
        small, editor.layers, batch, editor.gradients
    )
    if problem is not None:
        assert name in NOT_SERVED, problem
        return
    plain, tree = editor.gradients(batch), Tree(batch)
    found = answers_through(small, editor.layers, batch)
    # rows of 32 and 64 terms, through four blocks and back
    tolerance = 64 * torch.finfo(small.dtype).eps
    for layer, sides in plain.items():
        for side, other in zip(sides, found[layer], strict=True):
            for i, (first, count) in enumerate(zip(tree.firsts, tree.counts, strict=True)):
                expected = side[i, first : first + count]
                assert (other[i, :count] - expected).norm() <= tolerance * expected.norm(), (layer, i)
                assert not other[i, count:].any()
    assert all("forward" not in vars(m) and not m._forward_hooks for m in small.modules())


def test_what_texts_begin_with_is_there_once():
    batch = batch_of()
    tree, predicting = Tree(batch), (batch["labels"] != -100).sum()
    ids = batch["input_ids"].tolist()
    paths = {tuple(text[:end]) for text, first in zip(ids, tree.firsts, strict=True) for end in range(1, first + 1)}
    assert tree.nodes == len(paths)
    gaps = sum(tree.counts) - int(predicting)
    assert gaps == 3 and tree.ids.shape[1] == tree.nodes + sum(tree.counts)
    assert tree.ids.shape[1] < 0.6 * batch["attention_mask"].sum()
    rows: list[int] = []
    small = make_model("llama")
    editor = trained(small, "llama")
    small.model.layers[0].mlp.gate_proj.register_forward_hook(lambda m, args, y: rows.append(y.shape[:-1].numel()))
    answers_through(small, editor.layers, batch)
    assert rows == [tree.ids.shape[1]]


def test_edits_and_memories_are_those_of_texts_one_by_one(chatty, model, monkeypatch):  # noqa: F811
    facts = [*FACTS, *((f"Who is number {i}?", f"Person {i % 3}") for i in range(12))]
    editors = []
    for least in (1, 10**9):
        monkeypatch.setattr(mendfast.editor, "LEAST_TEXTS", least)
        editor = editor_of(model, chatty)
        editor.config = replace(editor.config, rows="answers")
        batch = editor.tokenize_edits(facts)
        assert editor.as_tree(batch) == (least == 1)
        memory = EditMemory(editor)
        memory.add(facts)
        editors.append((editor.wanted(batch), memory))
    (tree, by_tree), (plain, one_by_one) = editors
    for name in plain:
        assert tree[name].sample.equal(plain[name].sample)
        for one, other in zip(tree[name][:2], plain[name][:2], strict=True):
            assert (one - other).norm() <= 1e-4 * other.norm()
    assert by_tree.keys() == one_by_one.keys()
    for key in by_tree.keys():
        one, other = by_tree._records[key], one_by_one._records[key]
        assert one.request == other.request
        for name, sides in other.rows.items():
            for side, found in zip(sides, one.rows[name], strict=True):
                assert found.shape == side.shape and (found - side).norm() <= 1e-3 * side.norm()


def test_what_is_no_tree():
    batch = batch_of()
    assert regular(batch)
    assert not regular({**batch, "position_ids": batch["input_ids"]})
    assert not regular({name: value.flip(1) for name, value in batch.items()})  # padded on the left
    llama = make_model("llama")
    layers = trained(llama, "llama").layers
    assert why_not(llama, layers, 20) is None
    llama.config._attn_implementation = "eager"
    assert "scaled_dot_product_attention" in why_not(llama, layers, 20)
    head = MendEditor.from_model(make_model("llama"), None, MendConfig(layers=["lm_head.weight"]))
    assert "in none of its blocks" in why_not(head.model, head.layers, 20)
    assert "no causal model" in why_not(make_model("bert"), [], 20)


def test_a_model_that_attends_otherwise_is_found_out():
    small = make_model("llama")
    editor = trained(small, "llama")
    attention = small.model.layers[1].self_attn
    plain = attention.forward
    attention.forward = lambda *args, **kwargs: (torch.zeros_like(kwargs["hidden_states"]), None)
    with pytest.raises(NotServed, match="call scaled_dot_product_attention"):
        answers_through(small, editor.layers, batch_of())
    attention.forward = plain
    # sees how far apart rows lie
    mlp = small.model.layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x) + x.roll(1, 1)
    assert "other rows" in why_not_tried(small, editor.layers, batch_of(), editor.gradients)
