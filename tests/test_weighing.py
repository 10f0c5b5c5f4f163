"""Least squares in rounds of weighing: the weighed problem, the losses it goes by, and that nothing else is moved."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from conftest import make_batch, make_model
from test_edit_memory import REQUESTS, change, make
from test_editor import same_bits

from mendfast import EditMemory, MendConfig, MendEditor, weighing
from mendfast.aggregate import Wanted
from mendfast.capture import lowrank_updates, without_edits
from mendfast.weighing import Answers, balanced, moved, weighed

ROUNDS = {"rows": "answers", "rounds": 4, "rounds_protection": 1.0}


@pytest.fixture(scope="module")
def editor(tokenizer) -> MendEditor:
    """Whose edits are in each other's way."""
    editor = make(tokenizer, **ROUNDS)
    with torch.no_grad():
        editor.alpha_multiplier.fill_(50.0)
    return editor


# -- the weighed problem ---------------------------------------------------------------------------------------


def test_the_solution_is_that_of_the_weighed_squares(editor):
    """argmin_S sum_i w_i |S u_i - d_i|^2 + tr(S M S^T), by its normal equations in float64."""
    rows = editor.wanted(editor.tokenize_edits(REQUESTS[:5]))
    count = len(next(iter(rows.values())).u)
    weights = torch.rand(count, generator=torch.Generator().manual_seed(0)) * 3 + 0.1
    factors = editor.change(weighed(rows, weights, torch.arange(count), True), protection=2.0)
    for name, (spectrum, lam, mu) in editor.layer_metrics().items():
        u, d = rows[name].u.double(), rows[name].d.double()
        q, values = spectrum.vectors.double(), spectrum.values.double()
        m = lam.double() * values.sum() * torch.eye(len(q)) + 2 * mu.double() * (q * values) @ q.T
        normal = m + u.T @ (weights.double().unsqueeze(1) * u)
        expected = torch.linalg.solve(normal, u.T @ (weights.double().unsqueeze(1) * d)).T
        keys, delta, _ = factors[name]
        found = -(delta.double().T @ keys.double())
        assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_equal_weights_are_no_weights(editor):
    rows = editor.wanted(editor.tokenize_edits(REQUESTS[:5]))
    count = len(next(iter(rows.values())).u)
    same = weighed(rows, torch.ones(count), torch.arange(count), True)
    assert all(torch.equal(a, b) for name in rows for a, b in zip(rows[name], same[name], strict=True))


def test_a_layer_without_the_row_of_a_token_weighs_by_edits():
    rows = {
        "all": Wanted(torch.ones(4, 2), torch.ones(4, 3), torch.tensor([0, 0, 1, 1])),
        "some": Wanted(torch.ones(3, 2), torch.ones(3, 3), torch.tensor([0, 1, 1])),
    }
    weights, sample = torch.tensor([1.0, 3.0, 4.0, 12.0]), torch.tensor([0, 0, 1, 1])
    found = weighed(rows, weights, sample, True)
    assert found["all"].u[:, 0].square().tolist() == pytest.approx([1, 3, 4, 12])
    assert found["some"].d[:, 0].square().tolist() == pytest.approx([2, 8, 8])
    by_edit = weighed(rows, weights, sample, False)
    assert by_edit["all"].u[:, 0].square().tolist() == pytest.approx([2, 2, 8, 8])


def test_weights_move_with_the_losses():
    losses = torch.tensor([0.0, 0.01, 0.02, 5.0, torch.inf, torch.nan])
    weights = moved(torch.ones(6), losses, 0.01)
    assert weights[0] < weights[1] < weights[2] < weights[3] and weights[1] == 1
    assert weights[3:].tolist() == [weighing.STEP] * 3
    for _ in range(20):
        weights = moved(weights, losses, 0.01)
    assert weights[3:].tolist() == [weighing.MOST] * 3 and weights[:2].tolist() == [1 / weighing.MOST, 1]


def test_what_is_enough_may_differ_by_token():
    losses, enough = torch.tensor([0.1, 0.1, 0.1]), torch.tensor([0.01, 0.1, 1.0])
    far, half = (moved(torch.ones(3), losses, enough, power) for power in (0.5, 0.25))
    assert far[0] > 1 == far[1] > far[2]
    torch.testing.assert_close(half.square(), far)


# -- the losses it goes by ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_tree", [False, True])
def test_losses_are_the_edited_models(editor, as_tree):
    """Against transformers' own logits; the second time the frozen blocks' states are taken from the first."""
    requests = REQUESTS[:9]
    batches = [editor.tokenize_edits(some) for some in (requests[:5], requests[5:])]
    assert all(map(editor.as_tree, batches))
    answers = Answers(editor.model, editor.layers, batches, as_tree=lambda batch: as_tree)
    for edit in (editor.edit(requests), editor.edit(requests[:2])):
        found, expected, edits = answers.losses(edit.factors), [], []
        with edit.attached(editor.model), torch.no_grad():
            for i, request in enumerate(requests):
                batch = editor.tokenize_edits([request])
                logits = editor.model(batch["input_ids"]).logits[0, :-1].log_softmax(-1)
                labels = batch["labels"][0, 1:]
                kept = labels != -100
                expected.append(-logits[kept].gather(1, labels[kept].unsqueeze(1)).squeeze(1))
                edits += [i] * int(kept.sum())
        torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-5)
        assert answers.sample.tolist() == edits and not answers.form.any()


@pytest.mark.parametrize("texts", [1, 3])
def test_each_token_knows_its_form(editor, texts):
    """Of edits in three forms, each text a sample of the rows or each edit."""
    asked = [request for request in REQUESTS[:4] for _ in range(3)]
    batches = [editor.tokenize(some) for some in (asked[:9], asked[9:])]
    counts = torch.cat([(batch["labels"] != -100).sum(1) for batch in batches])
    answers = Answers(editor.model, editor.layers, batches, texts, forms=3)
    answers.losses(editor.edit(REQUESTS[:2]).factors)
    text = torch.arange(12).repeat_interleave(counts)
    assert answers.sample.tolist() == (text // texts).tolist() and answers.form.tolist() == (text % 3).tolist()


@pytest.mark.parametrize("name", ["t5", "bart", "bert", "bert_one_logit"])
def test_other_kinds_of_models(name):
    model = make_model(name)
    config = MendConfig(rank=4, aggregation="least_squares", rounds=2)
    editor = MendEditor.from_model(model, None, config)
    editor.train().wanted(make_batch(name))
    editor.eval().protect([make_batch(name, seed=4)])
    batch = make_batch(name, size=4, seed=1)
    edit = editor.edit_tokens(batch)
    editor.config.rounds = 0
    plain = editor.edit_tokens(batch)
    assert all(bool(u.isfinite().all()) for u, _, _ in edit.factors.values())
    assert any(not torch.equal(edit.factors[n][0], plain.factors[n][0]) for n in edit.factors)


# -- rows of inputs that are far longer than others -----------------------------------------------------------------


def test_a_long_input_wants_what_one_of_ordinary_length_does(editor):
    network = editor.networks[next(iter(editor.networks))]
    typical = float((network.u_mean.square() + network.u_std.square()).sum().sqrt())
    rows = torch.randn(6, network.m)
    lengths = torch.tensor([0.0, 0.1, 3.9, 4.1, 40.0, torch.inf])
    shares = network.shares(rows / rows.norm(dim=1, keepdim=True) * typical * lengths.clamp(max=1e6).unsqueeze(1))
    assert shares[:3].flatten().tolist() == [1, 1, 1]
    assert shares[3].item() == pytest.approx((4 / 4.1) ** 2, rel=1e-4) and shares[4].item() == pytest.approx(0.01)
    assert shares[5] < 1e-10


def test_the_limit_reaches_the_rows_and_their_records(editor, monkeypatch):
    batch = editor.tokenize_edits(REQUESTS[:3])
    whole = editor.wanted(batch)
    for network in editor.networks.values():
        monkeypatch.setattr(network, "longest", 0.5)
    cut = editor.wanted(batch)
    for layer in editor.layers:
        network = next(net for key, net in editor.networks.items() if layer in editor._groups[key])
        share = network.shares(whole[layer.name].u)
        torch.testing.assert_close(cut[layer.name].d, share * whole[layer.name].d)
        assert share.max() < 1
    assert torch.equal(whole[layer.name].u, cut[layer.name].u)


def test_an_editor_that_has_seen_nothing_has_no_limit(tokenizer):
    editor = MendEditor.from_model(make_model("gpt2"), None, MendConfig(rank=4, longest=1e-6))
    network = next(iter(editor.networks.values()))
    assert bool((network.shares(torch.ones(3, network.m)) == 1).all())
    assert MendConfig.from_dict({}).longest is None and MendConfig().longest == 4.0  # an editor of before had none


# -- the rounds ----------------------------------------------------------------------------------------------------


def test_tokens_told_badly_gain(editor):
    """At equal protection; and a token that was told with room to spare has less weight at the end."""
    plain_steps = editor.untrained()
    with torch.no_grad():
        plain_steps.alpha_multiplier.fill_(10.0)
    batch = plain_steps.tokenize_edits(REQUESTS[:24])
    rows = plain_steps.wanted(batch)
    answers, solved = Answers(editor.model, editor.layers, [batch]), []

    def solve(given):
        solved.append(given)
        return plain_steps.change(given)

    before = answers.losses(plain_steps.change(rows))
    enough = float(before.median())
    factors = balanced(rows, answers, solve, rounds=4, enough=(enough, 0.0), by_token=True)
    after = answers.losses(factors)
    assert len(solved) == 5 and after.max() < before.max()
    assert (after - enough).clamp(min=0).mean() < 0.98 * (before - enough).clamp(min=0).mean()
    name = next(iter(rows))
    weights = (solved[-1][name].u.norm(dim=1) / rows[name].u.norm(dim=1)).square()
    assert weights[before.argmin()] < 1 < weights[before.argmax()]


class Told:
    """Answers of two tokens, in the first and the second form of an edit, whose losses are what a test says."""

    sample, form = torch.tensor([0, 0]), torch.tensor([0, 1])

    def __init__(self, losses):
        self._losses = losses

    def losses(self, factors):
        return torch.tensor(self._losses[factors["at"]])


def told(losses, enough=(0.01, 0.01)):
    """Which solution :func:`balanced` takes, and the weights of each."""
    weights = []

    def solve(given):
        weights.append(given["weight"].u[:, 0].square())
        return {"at": len(weights) - 1}

    rows = {"weight": Wanted(torch.ones(2, 3), torch.ones(2, 4), torch.tensor([0, 0]))}
    found = balanced(rows, Told(losses), solve, rounds=len(losses) - 1, enough=enough, by_token=True)
    return found["at"], weights


@pytest.mark.parametrize(
    ("means", "taken"),
    [
        ((1.0, 0.5, 0.7, 0.1), 3),
        ((1.0, 2.0), 0),
        ((1.0, 0.5, 0.4, 0.6), 2),
        ((1.0, torch.nan), 0),
        ((torch.nan, 9.0), 1),
        ((0.01, 0.001), 1),
    ],
)
def test_a_round_after_which_more_is_missing_is_taken_back(means, taken):
    """Where the rows have no room for all tokens, weight for some is at the others' cost; with no more missing, less
    weight is a smaller change."""
    at, weights = told([(mean, mean) for mean in means])
    assert at == taken and len(weights) == len(means)


def test_after_one_that_went_too_far_the_next_goes_half_as_far():
    _, weights = told([(0.03, 0.03), (0.05, 0.03), (0.02, 0.03)])
    factor = ((0.03 + weighing.SLACK) / (0.01 + weighing.SLACK)) ** 0.5
    torch.testing.assert_close(weights[1], torch.full((2,), factor))
    torch.testing.assert_close(weights[2], torch.full((2,), factor**0.5))


def test_what_is_missing_is_counted_form_by_form():
    """The second form's tokens may lose what the first one's gain."""
    losses = [(0.5, 0.1), (0.2, 0.2), (0.1, 0.9)]
    at, weights = told(losses, (0.01, 0.3))
    assert at == 1 and weights[1][0] > 1 > weights[1][1]
    assert told(losses, (0.01, 0.01))[0] == 1 and told(losses, (0.01, 1.0))[0] == 2


def test_no_rounds_is_one_solution(editor, monkeypatch):
    monkeypatch.setattr(editor, "config", replace(editor.config, rounds=0))
    rows = editor.wanted(editor.tokenize_edits(REQUESTS[:9]))
    monkeypatch.setattr(Answers, "losses", None)  # nothing is run for them
    plain, edit = editor.change(rows), editor.edit(REQUESTS[:9])
    assert all(torch.equal(a, b) for n in plain for a, b in zip(plain[n][:2], edit.factors[n][:2], strict=True))


def test_in_several_passes_as_in_one(editor, monkeypatch):
    one = editor.edit(REQUESTS[:20])
    monkeypatch.setattr("mendfast.editor.EDITS_PER_PASS", 7)
    several = editor.edit(REQUESTS[:20])
    one, several = change(one), change(several)
    assert all((one[name] - several[name]).norm() <= 1e-3 * one[name].norm() for name in one)


# -- in a memory -----------------------------------------------------------------------------------------------------


def test_a_memory_weighs_too_whatever_the_order(editor):
    memory, other = EditMemory(editor), EditMemory(editor)
    memory.add(REQUESTS[:12])
    other.add(REQUESTS[20:24])
    other.add(REQUESTS[6:12])
    other.add(REQUESTS[:6])
    other.remove(*(prompt for prompt, _ in REQUESTS[20:24]))
    found, again = change(memory.edit()), change(other.edit())
    assert all((found[name] - again[name]).norm() <= 1e-3 * found[name].norm() for name in found)
    at_once = change(editor.edit(REQUESTS[:12]))
    assert all((found[name] - at_once[name]).norm() <= 1e-3 * found[name].norm() for name in found)


def test_a_memory_weighs_on_the_unedited_model(editor):
    """Whatever is applied or attached meanwhile, itself and another edit."""
    memory = EditMemory(editor)
    memory.add(REQUESTS[:8])
    alone = memory.edit()
    before = {name: tensor.clone() for name, tensor in editor.model.state_dict().items()}
    with editor.edit(*REQUESTS[40]).attached(editor.model):
        memory.apply_()
        memory._solved = None
        again = memory.edit()
        memory.revert_()
    for name, (keys, delta, _) in alone.factors.items():
        assert torch.equal(keys, again.factors[name][0]) and torch.equal(delta, again.factors[name][1])
    assert same_bits(editor.model, before)


def test_it_is_made_again_when_the_rounds_change(editor, monkeypatch):
    memory = EditMemory(editor)
    memory.add(REQUESTS[:8])
    first = memory.edit()
    assert memory.edit() is first
    monkeypatch.setattr(editor, "config", replace(editor.config, rounds=1))
    assert memory.edit() is not first


def test_a_private_update_is_its_own_threads(editor):
    """Another thread's pass sees nothing of it; its own sees it even within without_edits."""
    factors, ids = editor.edit(*REQUESTS[0]).factors, editor.tokenize_edits(REQUESTS[:1])["input_ids"]

    def logits():
        with torch.no_grad():
            return editor.model(ids).logits

    plain, seen = logits(), []
    with lowrank_updates(editor.layers, factors, editor.model, private=True):
        mine = logits()
        thread = threading.Thread(target=lambda: seen.append(logits()))
        thread.start()
        thread.join()
        with without_edits(editor.model):
            assert torch.equal(logits(), mine)
    assert torch.equal(seen[0], plain) and not torch.equal(mine, plain)


def test_settings_are_kept(tmp_path, editor):
    editor.save_pretrained(tmp_path)
    again = MendEditor.from_pretrained(tmp_path, editor.model, editor.tokenizer)
    assert (again.config.rounds, again.config.rounds_protection) == (4, 1.0)
    assert MendConfig.from_dict({"rounds_enough": 0.2}).rounds_enough_beside == 0.2  # once they were one
    assert MendConfig.from_dict({}).rounds_enough_beside == MendConfig().rounds_enough_beside
    wrongs = {"rounds": -1}, {"rounds": 1.5}, {"rounds_enough": -0.1}, {"rounds_enough_beside": -1.0}
    for wrong in (*wrongs, {"rounds_protection": 0.0}):
        with pytest.raises((ValueError, TypeError), match=next(iter(wrong))):
            replace(editor.config, **wrong)
