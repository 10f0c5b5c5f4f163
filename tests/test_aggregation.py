"""MendEditor with aggregation="least_squares": what it protects, saves and learns, and where nothing is to do."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import make_batch, make_model
from test_edit_memory import LAYERS, REQUESTS, TEXTS, change, close, make
from test_editor import same_bits, state

from mendfast import Edit, MendConfig, MendEditor
from mendfast.edit import disturbance_in_words
from mendfast.metric import Metric


@pytest.fixture
def editor(tokenizer) -> MendEditor:
    return make(tokenizer)


def moments(metric: Metric) -> dict[str, torch.Tensor]:
    return {name: moment.matrix() for name, moment in metric.moments.items()}


def protected(editor: MendEditor, *parts, **options) -> Metric:
    editor.metric = None
    for part in parts:
        metric = editor.protect(part, **options)
    assert metric is editor.metric
    return metric


def same(one: Metric, other: Metric) -> None:
    assert one.tokens == other.tokens
    for name, matrix in moments(one).items():
        torch.testing.assert_close(matrix, moments(other)[name], rtol=1e-4, atol=1e-5)


def test_what_is_protected_in_whatever_form(editor):
    whole = protected(editor, TEXTS)
    same(protected(editor, TEXTS[:7], TEXTS[7:], batch_size=3), whole)
    same(protected(editor, list(editor.text_batches(TEXTS))), whole)
    pairs = [tuple(text.split(" is ")) for text in TEXTS]
    assert protected(editor, pairs).tokens == sum(len(editor.encode(*pair)["input_ids"]) for pair in pairs)
    x, rows = {}, protected(editor, [TEXTS[0]])
    for layer in editor.layers:
        layer.module.register_forward_hook(lambda m, args, out, name=layer.name: x.update({name: args[0][0]}))
    with torch.no_grad():
        editor.model(editor.tokenizer(TEXTS[0], return_tensors="pt")["input_ids"])
    for name, matrix in moments(rows).items():
        torch.testing.assert_close(matrix, x[name].T @ x[name] / len(x[name]), rtol=1e-4, atol=1e-5)


def test_its_own_words_are_the_default(editor):
    before = state(editor.model)
    metric = protected(editor, None, samples=3, max_new_tokens=8)
    assert metric.tokens and same_bits(editor.model, before)
    assert editor.edit(REQUESTS[:2]).factors


def test_it_is_saved_whole(editor, tmp_path, tokenizer):
    with torch.no_grad():
        editor.log_lambda += torch.tensor([0.5, -0.5])
        editor.log_mu += torch.tensor([-1.0, 1.0])
    editor.save_pretrained(tmp_path)
    loaded = MendEditor.from_pretrained(tmp_path, editor.model, tokenizer)
    assert loaded.config == editor.config and loaded.metric.tokens == editor.metric.tokens
    assert torch.equal(loaded.log_lambda, editor.log_lambda) and torch.equal(loaded.log_mu, editor.log_mu)
    assert close(loaded.edit(REQUESTS[:3]), editor.edit(REQUESTS[:3]), 1e-5)
    loaded.protect(TEXTS[:5])
    assert loaded.metric.tokens > editor.metric.tokens


def test_an_editor_from_before_the_choice_sums(editor, tmp_path, tokenizer):
    old = make(tokenizer, "sum")
    old.save_pretrained(tmp_path)
    path = tmp_path / "mend_config.json"
    values = json.loads(path.read_text())
    for name in ("aggregation", "ridge", "protection", "protect_rank"):
        del values[name]
    path.write_text(json.dumps(values))
    (tmp_path / "metric.safetensors").unlink()
    loaded = MendEditor.from_pretrained(tmp_path, old.model, tokenizer)
    assert loaded.config.aggregation == "sum" and not hasattr(loaded, "log_mu") and loaded.metric is None
    assert close(loaded.edit(REQUESTS[:3]), old.edit(REQUESTS[:3]), 1e-6)
    assert close(old.edit(REQUESTS[:3]), Edit.sum([old.edit(*request) for request in REQUESTS[:3]]), 1e-5)


def test_an_untrained_one_protects_the_same(editor):
    fresh = editor.untrained()
    assert fresh.metric is editor.metric and fresh.config == editor.config
    assert torch.equal(fresh.log_mu, torch.full((2,), math.log(editor.config.protection)))
    one, other = change(fresh.edit(REQUESTS[:2])), change(editor.edit(REQUESTS[:2]))
    assert all((one[name] - other[name]).norm() > 1e-3 * other[name].norm() for name in one)


def test_a_step_moves_lambda_and_mu(editor):
    """Through the solve: each makes smaller what it weighs, |S|^2 and E|S x|^2 over protected text."""
    before = [scale.detach().clone() for scale in editor.scales()]
    optimizer = torch.optim.SGD(editor.scales(), lr=0.1)
    factors = editor.group_factors(editor.tokenize(REQUESTS[:4]), 2)
    changes = {name: delta.mT @ u for name, (u, delta, _) in factors.items()}
    size = sum(change.square().sum().log() for change in changes.values())
    moved = sum(((s @ editor.metric.moments[name].matrix()) * s).sum().log() for name, s in changes.items())
    (by_lambda,) = torch.autograd.grad(size, editor.log_lambda, retain_graph=True)
    (by_mu,) = torch.autograd.grad(moved, editor.log_mu, retain_graph=True)
    assert (by_lambda < 0).all() and (by_mu < 0).all()
    (size + moved).backward()
    optimizer.step()
    for scale, old in zip(editor.scales(), before, strict=True):
        assert scale.isfinite().all() and (scale != old).all()


def test_the_guarantee_holds_on_what_is_protected(editor):
    edit = editor.edit(REQUESTS[:8])
    wanted = editor.wanted(editor.tokenize(REQUESTS[:8]))
    disturbance = edit.disturbance(editor)
    for layer, (_, _, mu) in zip(editor.layers, editor.layer_metrics().values(), strict=True):
        weight = layer.weight.detach() if layer.layout == "out_in" else layer.weight.detach().T
        whole = editor.metric.moments[layer.name].mean_square(weight)
        assert 0 < disturbance[layer.name] * whole <= wanted[layer.name].d.square().sum() / mu
        assert list(disturbance) == LAYERS


def test_disturbance_is_of_the_unedited_weights(editor):
    edit = editor.edit(REQUESTS[:8])
    before, edited = edit.disturbance(editor), edit.apply_(editor.model) and state(editor.model)
    assert edit.disturbance(editor) == before and same_bits(editor.model, edited)


def test_disturbance_in_words(editor):
    say = disturbance_in_words
    assert say({"a": 9e-8, "b": 1e-8}) == "On protected text the edited layers' outputs change by 0.03 % at most (a)."
    assert "by 2.5 %" in say({"a": 6.25e-4}) and "by 120 %" in say({"a": 1.44})
    assert "less than 0.001 %" in say({"a": 0.0}) and say({}) == "The edit changes no layer."
    editor.metric, edit = None, editor.edit(REQUESTS[0])
    with pytest.raises(ValueError, match=r"Nothing is protected.*editor.protect\(texts\)"):
        edit.disturbance(editor)


@pytest.mark.parametrize("aggregation", ["sum", "least_squares"])
def test_a_certain_target_wants_nothing(tokenizer, aggregation):
    """T = 0: a head that knows one answer alone leaves no gradient, hence no rows."""
    editor = make(tokenizer, aggregation)
    model, batch = editor.model, make_batch("gpt2", 2)
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    edit = editor.edit_tokens(batch)
    assert all(len(u) == len(delta) == 0 for u, delta, _ in edit.factors.values())
    before = state(model)
    edit.apply_(model)
    assert same_bits(model, before)
    if aggregation == "least_squares":
        assert set(edit.disturbance(editor).values()) == {0.0}


def test_bad_input(editor, tokenizer):
    for nothing in ([], [""]):
        with pytest.raises(ValueError, match="nothing to protect|becomes no tokens"):
            editor.protect(nothing)
    with pytest.raises(TypeError, match="texts is a str; pass a list"):
        editor.protect("One text.")
    other = MendEditor.from_model(make_model("llama"), tokenizer, MendConfig(rank=8, aggregation="least_squares"))
    with pytest.raises(ValueError, match="made for a gpt2 model; this one is a llama"):
        other.protect_with(editor.metric)
    with pytest.raises(ValueError, match=r"nothing is protected yet.*editor.protect\("):
        other.edit_tokens(make_batch("llama"))
