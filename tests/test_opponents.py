"""The opponents, each against its paper's equations, written out here in a few lines on a tiny model."""

from __future__ import annotations

import math
import types
from functools import partial

import pytest
import torch
from test_baselines import base, edits, make, sampler, training
from test_editor import same_bits, state
from tqdm import tqdm

from mendfast import EditMemory, EditRequest, MendConfig, MendEditor, ops
from mendfast.baselines.measure import Before
from mendfast.baselines.mend import Malmen, Mend, MendSum
from mendfast.commands.rates import Choice, Tally
from mendfast.frozen_prefix import FrozenPrefix
from mendfast.generation import answer
from mendfast.objective import nll, target_rows
from mendfast.tasks.records import Example
from mendfast.training.processes import Processes


def oriented(layer, weight: torch.Tensor) -> torch.Tensor:
    """[n, m], whatever the layout."""
    return (weight if layer.layout == "out_in" else weight.T).detach().clone()


def moves(system, requests, **options) -> dict[str, torch.Tensor]:
    """What an edit adds to each weight, [n, m], of systems that write into them."""
    before = {layer.name: oriented(layer, layer.weight) for layer in system.subject.layers}
    with system.edit(requests, **options):
        return {layer.name: oriented(layer, layer.weight) - before[layer.name] for layer in system.subject.layers}


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """To float32's rounding in solves of a condition below a thousand."""
    assert expected.norm() > 0
    assert (got - expected).norm() <= 1e-4 * expected.norm()


def stirred(editor: MendEditor) -> MendEditor:
    """An editor whose networks and statistics are not those of the beginning."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in editor.networks.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
        editor.train()
        editor.transform(editor.gradients(editor.tokenize(sampler("gpt2").draw(0, 6).inner)))
    return editor.eval()


# -- MEND summed, MALMEN -----------------------------------------------------------------------------------


def test_mend_summed_is_the_same_editor_under_the_other_aggregation(tokenizer):
    config = MendConfig(rank=8, step_size=1e-2, aggregation="least_squares")
    editor = stirred(MendEditor.from_model(base("gpt2", tokenizer), tokenizer, config))
    system = MendSum.of(editor)
    assert system.subject.networks is editor.networks and editor.config.aggregation == "least_squares"
    both = system.subject.edit(edits("gpt2"))
    alone = [system.subject.edit(*request) for request in edits("gpt2")]
    for name, (u, delta, alpha) in both.factors.items():
        close(
            alpha * delta.T @ u, sum(e.factors[name].alpha * e.factors[name].delta.T @ e.factors[name].u for e in alone)
        )


@pytest.mark.parametrize("in_turn", [False, True])
def test_the_weight_of_c_is_that_of_an_editor_with_so_much_more_mu(tokenizer, in_turn):
    config = MendConfig(rank=8, step_size=1e-2, aggregation="least_squares")
    editor = stirred(MendEditor.from_model(base("gpt2", tokenizer), tokenizer, config))
    editor.protect(["Lima is a city. Oslo is another one."])
    learned, system = editor.log_mu.detach().clone(), Mend(editor, weight=8.0)
    requests = [EditRequest(*pair) for pair in edits("gpt2")]

    def made() -> list[torch.Tensor]:
        with system.edit(requests, in_turn=in_turn), torch.no_grad():
            return [target_rows(editor.model, editor.tokenize(edits("gpt2"))).logits]

    weighed = made()[0]
    assert editor.log_mu.equal(learned)
    system.weight = 1.0
    assert not made()[0].allclose(weighed)
    with torch.no_grad():
        editor.log_mu.add_(math.log(8.0))
    close(made()[0], weighed)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_a_trial_sees_which_other_answers_an_edit_changes(tokenizer, name):
    """Of a classifier too, whose edited model's class was once held against itself: every rate left all of them."""
    system = make("ft", name, tokenizer)
    system.learning_rate, system.max_steps = 0.3, 20
    others = [f"Is {city} a city of {country}?" for city in ("Lima", "Oslo", "Rome") for country in ("Peru", "Chad")]
    examples = [Example(*pair) for pair in edits(name)]
    asked = types.SimpleNamespace(after=lambda *_, **__: {"rephrasings": [], "locality": [(q, "") for q in others]})
    before = Before(system.subject)
    tally = Choice(examples[:1], asked, Processes())._tally(system, before, [0])
    said = [given.text for given in before.answers(others, 16)]
    with system.edit([(examples[0].prompt, examples[0].target)]):
        now = answer(system.subject, others, 16)
    assert tally.kept == [one == other for one, other in zip(said, now, strict=True)] and not all(tally.kept)


@pytest.mark.parametrize("in_turn", [False, True])
def test_rounds_of_weighing_may_be_given(tokenizer, in_turn):
    config = MendConfig(rank=8, step_size=1e-2, aggregation="least_squares", rounds=3)
    editor = stirred(MendEditor.from_model(base("gpt2", tokenizer), tokenizer, config))
    editor.protect(["Lima is a city. Oslo is another one."])
    requests = [EditRequest(*pair) for pair in edits("gpt2")]

    def made(**options) -> torch.Tensor:
        with Mend(editor, **options).edit(requests, in_turn=in_turn), torch.no_grad():
            return target_rows(editor.model, editor.tokenize(edits("gpt2"))).logits

    own, without = made(), made(rounds=0)
    assert editor.config.rounds == 3 and not own.allclose(without)
    assert own.equal(made(rounds=3))
    editor.config.rounds = 0
    assert without.equal(made())
    with pytest.raises(ValueError, match="rounds"):
        Mend(editor, rounds=-1)


def test_of_many_edits_at_once_the_weight_of_c_is_chosen(tokenizer, monkeypatch):
    """An editor has learned one for edits of all sizes."""
    config = MendConfig(rank=8, aggregation="least_squares")
    system = Mend(MendEditor.from_model(base("gpt2", tokenizer), tokenizer, config))
    examples = [Example(*pair) for pair in edits("gpt2")]
    asked = types.SimpleNamespace(after=lambda *_, **__: {"rephrasings": [], "locality": []})
    shares = {1.0: 0.2, 2.0: 0.5, 4.0: 0.9, 8.0: 0.6, 16.0: 0.1}

    def tally(system, before, groups):
        right = [i < 10 * shares[system.weight] for i in range(10)]
        return Tally(right=right, same=1, tokens=1)

    monkeypatch.setattr(Choice, "_tally", lambda self, *args: tally(*args))
    for at_once, expected in ((True, 4.0), (False, 1.0)):
        found = Choice(examples, asked, Processes(), at_once=at_once).choose(system, None)
        assert system.weight == expected and (found is None) is not at_once
        system.weight = 1.0
    summed = MendSum.of(system.subject)
    assert summed.weight is None and Choice(examples, asked, Processes(), at_once=True).choose(summed, None) is None
    assert make("malmen", "gpt2", tokenizer).weight is None
    assert Mend.of(system.subject, weight=3.0).weight == 3.0  # as an --option gives it
    with pytest.raises(ValueError, match="nothing to weigh"):
        MendSum.of(system.subject, weight=3.0)
    with pytest.raises(ValueError, match="weight is 0"):
        Mend(system.subject, weight=0.0)


def test_malmen_solves_the_normal_equations_with_a_ridge_alone(tokenizer, tmp_path):
    """Delta W = D^T U (lambda I + U^T U)^-1 over all rows of all edits, d = -alpha (u . u~) delta~."""
    system = make("malmen", "gpt2", tokenizer)
    editor = stirred(system.subject)
    with torch.no_grad():
        editor.log_lambda.copy_(torch.linspace(-1, 1, len(editor.layers)))
    rows = editor.transform(editor.gradients(editor.tokenize(edits("gpt2"))))
    edit = editor.edit(edits("gpt2"))
    for name, lam, alpha in zip(rows, editor.log_lambda.exp(), editor.alphas(), strict=True):
        u, new_u, new_delta, *_ = rows[name]
        d = -alpha * (u * new_u).sum(1, keepdim=True) * new_delta
        expected = torch.linalg.solve(lam * torch.eye(u.shape[1]) + u.T @ u, u.T @ d).T
        got, delta, step = edit.factors[name]
        close(-step * delta.T @ got, expected)
    system.save(tmp_path)
    again = make("malmen", "gpt2", tokenizer)
    again.load(tmp_path)
    with pytest.raises(ValueError, match="no editor for MEND, summed: its aggregation differ"):
        make("mend_sum", "gpt2", tokenizer).load(tmp_path)
    loaded = again.subject.edit(edits("gpt2"))
    assert all(torch.equal(a.u, b.u) for a, b in zip(edit.factors.values(), loaded.factors.values(), strict=True))


def test_malmen_learns_its_ridge_and_nothing_else_of_the_metric(tokenizer):
    system = make("malmen", "gpt2", tokenizer)
    assert isinstance(system, Malmen)
    system.fit(sampler("gpt2"), training(steps=2, alpha_learning_rate=0.1, joint=[2]), progress=False)
    moved = (system.subject.log_lambda.detach().abs(), (system.subject.log_mu.exp() * 1e30 - 1).detach().abs())
    assert moved[0].min() > 1e-3 and moved[1].max() < 1e-4


def test_mend_in_turn_is_what_a_memory_makes(tokenizer):
    system = make("mend", "gpt2", tokenizer)
    memory = EditMemory(system.subject)
    memory.add(edits("gpt2"))
    batch = system.subject.tokenize(edits("gpt2"))
    with memory.attached() as model, torch.no_grad():
        expected = target_rows(model, batch).logits
    with system.edit(edits("gpt2"), in_turn=True) as model, torch.no_grad():
        assert torch.equal(target_rows(model, batch).logits, expected)


# -- UltraEdit ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_ultraedit(name, tokenizer):
    """Two turns of one edit: v = -eta |h'|^2 g', Delta W = V^T H (H^T H + I)^-1, rows normalised by all so far."""
    system = make("ultraedit", name, tokenizer, turn=1, learning_rate=1e-3)
    subject, before = system.subject, state(system.subject.model)
    seen: dict[tuple[int, int], list[torch.Tensor]] = {layer.shape: [] for layer in subject.layers}
    expected = {layer.name: torch.zeros(layer.n, layer.m) for layer in subject.layers}
    for request in edits(name):
        captured = subject.gradients(subject.tokenize([request]))
        rows = {key: torch.cat(sides, -1).flatten(0, 1) for key, sides in captured.items()}
        rows = {
            layer.name: rows[layer.name][rows[layer.name][:, layer.m :].abs().amax(1) > 0] for layer in subject.layers
        }
        for layer in subject.layers:
            seen[layer.shape].append(rows[layer.name])
        for layer in subject.layers:
            known = torch.cat(seen[layer.shape]).double()
            h, _ = rows[layer.name].double().split(layer.shape, 1)
            normal_h, normal_g = ((rows[layer.name] - known.mean(0)) / (known.std(0) + 1e-7)).split(layer.shape, 1)
            v = -1e-3 * (normal_h**2).sum(1, keepdim=True) * normal_g
            change = torch.linalg.solve(h.T @ h + torch.eye(layer.m).double(), h.T @ v).T
            expected[layer.name] += change
            with torch.no_grad():
                layer.weight.add_((change if layer.layout == "out_in" else change.T).float())
    subject.model.load_state_dict(before)
    got = moves(system, edits(name))
    for key, change in expected.items():
        close(got[key], change.float())
    again = moves(system, edits(name))
    assert all(torch.equal(got[key], again[key]) for key in got), "what was measured before plays no part"
    assert same_bits(subject.model, before)


# -- fine-tuning -------------------------------------------------------------------------------------------


def adam(model, weights, loss, steps: int, rate: float) -> None:
    """``steps`` of Adam, of PyTorch's own, by backward()."""
    optimizer = torch.optim.Adam(weights, lr=rate)
    for step in range(steps):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()


def test_fine_tuning_one_layer_moves_one_matrix(tokenizer):
    system = make("ft_one_layer", "gpt2", tokenizer, max_steps=2, learning_rate=1e-2, layer=1)
    chosen = system.subject.layers[1].name
    moved = moves(system, edits("gpt2"))
    assert [name for name, change in moved.items() if change.any()] == [chosen]
    with pytest.raises(ValueError, match="layer is 6, and there are 6 layers; pass -6 to 5"):
        make("ft_one_layer", "gpt2", tokenizer, layer=6)


def test_fine_tuning_in_turn_trains_one_request_after_the_other(tokenizer):
    system = make("ft", "gpt2", tokenizer, max_steps=2, learning_rate=1e-2)
    one, two = edits("gpt2")
    with system.edit([one]):
        second = moves(system, [two])
        first = moves(make("ft", "gpt2", tokenizer, max_steps=2, learning_rate=1e-2), [one])
    both = moves(system, [one, two], in_turn=True)
    for name, change in both.items():
        torch.testing.assert_close(change, first[name] + second[name], rtol=0, atol=1e-6)
    assert any((both[name] - change).abs().max() > 1e-4 for name, change in moves(system, [one, two]).items())


def test_breadth_first_is_adam_on_one_matrix_over_targets_that_end(tokenizer):
    """One batch of both edits: plain Adam on Hugging Face's own loss of each, the end token among its labels."""
    system = make("ft_breadth_first", "gpt2", tokenizer, learning_rate=1e-2, epochs=3)
    got = moves(system, edits("gpt2"))
    model, layer = system.subject.model, system.subject.layers[-1]
    layer.weight.requires_grad_(True)
    before = oriented(layer, layer.weight)

    def loss(step):
        losses = []
        for prompt, target in edits("gpt2"):
            start, whole = (tokenizer(text)["input_ids"] for text in (prompt, f"{prompt} {target}<eos>"))
            ids = torch.tensor([whole])
            labels = ids.clone()
            labels[:, : len(start)] = -100
            losses.append(model(input_ids=ids, labels=labels).loss)
        return sum(losses) / len(losses)

    adam(model, [layer.weight], loss, 3, 1e-2)
    # Adam's first steps are signs of gradients: an entry whose gradient is rounding error may go either way
    difference = (oriented(layer, layer.weight) - before - got[layer.name]).abs()
    assert (difference > 1e-4).float().mean() < 0.01
    assert all(not change.any() for name, change in got.items() if name != layer.name)


def test_breadth_first_stops_below_the_loss_that_is_enough(tokenizer):
    system = make("ft_breadth_first", "gpt2", tokenizer, learning_rate=2e-2, epochs=100, enough=4.5)  # ln 301: 5.7
    with system.edit(edits("gpt2")):
        taught = system._taught.tokenize(edits("gpt2"))
        with torch.no_grad():
            losses = nll(target_rows(system.subject.model, taught), 2)
        assert 1 < system.steps < 100 and losses.mean() < 4.5
        assert (taught["labels"] == tokenizer.eos_token_id).any()
        with system.edit(edits("gpt2")):
            assert system.steps == 1, "there was nothing left to learn"


def test_ridge_of_the_isotropic_metric():
    from mendfast.baselines.ultraedit import _NOTHING, isotropic

    u, d = torch.randn(5, 7), torch.randn(5, 3)
    keys, delta = ops.least_squares(u, d, isotropic(7), 2.0, _NOTHING)
    torch.testing.assert_close(-delta.T @ keys, torch.linalg.solve(2 * torch.eye(7) + u.T @ u, u.T @ d).T)


# -- ROME --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_rome_is_the_least_change_that_maps_the_key_to_the_value(name, tokenizer, monkeypatch):
    """W~ = W + (v - W k) (C^-1 k)^T / (k^T C^-1 k); v is the same read from the subject on as from whole texts."""
    from mendfast.baselines import rome

    system = make("rome", name, tokenizer, steps=4, prefixes=3, words=4)
    system.prepare()
    (layer,), request = system.layers, EditRequest(*edits(name)[0])
    fact, before = system._fact(request), oriented(system.layers[0], system.layers[0].weight)
    key, origin = system._seen(fact, layer, layer.module, FrozenPrefix(system.subject.model, [layer]))
    value = system.value(fact, layer.module, origin)
    with monkeypatch.context() as patched:
        patched.setattr(rome._Rest, "of", lambda model, fact: rome._Rest.whole(fact))
        expected = system.value(fact, layer.module, origin)
    moved = (expected - layer.module(key).detach()).norm()
    assert moved > 0 and (value - expected).norm() <= 1e-4 * expected.norm()  # float32, sums in another order
    key = key.double()
    c = system.metric.moments[layer.name].matrix().double()
    c.diagonal().add_(rome.TINY * c.trace())
    u = torch.linalg.solve(c, key)
    bias = layer.module.bias.detach().double() if getattr(layer.module, "bias", None) is not None else 0.0
    missing = value.double() - before.double() @ key - bias
    with system.edit([edits(name)[0]]):
        change = oriented(layer, layer.weight) - before
    close(change, (missing[:, None] * (u / (u @ key))[None]).float())


def test_processes_share_the_validation_edits_of_one_trial(tokenizer, monkeypatch):
    """As many trials as processes or not: each has half of the edits, and the sum is as one process makes it; a trial
    that breaks the model in one process has broken it."""
    system = make("ft", "gpt2", tokenizer)
    examples = [Example(*pair) for pair in edits("gpt2")] * 2
    asked = types.SimpleNamespace(after=lambda *_, **__: {"rephrasings": [], "locality": []})
    trials = [{"learning_rate": rate} for rate in (1e-3, 1e-2, 1.0)]
    made = []

    def tally(self, system, before, groups):
        made.append((system.learning_rate, list(groups)))
        if system.learning_rate == 1.0 and 1 in groups:
            raise ValueError("it broke the model")
        return Tally(right=[i % 3 == 0 for i in groups], same=len(groups), tokens=2 * len(groups), steps=max(groups))

    monkeypatch.setattr(Choice, "_tally", tally)

    def found(trials, processes):
        del made[:]
        choice = Choice(examples, asked, processes)
        tallies = choice._trials(system, None, trials, range(len(examples)), tqdm(disable=True))
        return [(sorted(t.right), t.same, t.tokens, t.steps) for t in tallies], list(made)

    def said(shares, mine):
        shares.append(mine)
        return [*shares, {}]

    for some in (trials, trials[1:], trials[:1]):
        alone, _ = found(some, Processes())
        shares: list[dict] = []
        ranks = [types.SimpleNamespace(rank=rank, count=2, objects=partial(said, shares)) for rank in range(2)]
        (_, first), (tallies, second) = (found(some, each) for each in ranks)  # the second one hears of both
        counts = [sum(len(groups) for _, groups in part) for part in (first, second)]
        assert tallies == alone
        assert counts[0] == counts[1] == len(some) * len(examples) / 2
        each = [{group for _, groups in part for group in groups} for part in (first, second)]
        assert not each[0] & each[1]  # what a process remembers of an edit serves all trials
    assert found(trials, Processes())[0][2] == ([], 0, 0, 0)


def test_a_system_that_can_try_no_rate_says_so_and_keeps_its_own(tokenizer, monkeypatch):
    system = make("ft", "gpt2", tokenizer)
    asked = types.SimpleNamespace(after=lambda *_, **__: {"rephrasings": [], "locality": []})

    def tally(self, system, before, groups):
        raise ValueError("the data names no subject")

    monkeypatch.setattr(Choice, "_tally", tally)
    system.learning_rate = 0.5
    with pytest.warns(UserWarning, match=r"No rate of FT could be tried.*the data names no subject"):
        assert Choice([Example(*edits("gpt2")[0])], asked, Processes()).choose(system, None) is None
    assert system.learning_rate == 0.5
