"""The systems that MEND is compared with: each against its equations, all behind one interface."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import make_model
from test_editor import gradient, same_bits, state

from mendfast import MendConfig, MendEditor, ops
from mendfast.baselines import SYSTEMS, EditableNetwork, FineTuning, FineTuningKL, KnowledgeEditor, make_system
from mendfast.baselines.fitting import GRADIENT_STEPS, STARTING_KL, best_gradient_step
from mendfast.capture import frozen
from mendfast.generation import answer
from mendfast.metrics import correct
from mendfast.objective import kept_rows
from mendfast.training import FactSampler, Item, TrainConfig, TrainingError

ANSWERS = {
    "gpt2": ("Paris", "Rome", "Berlin", "Madrid"),
    "llama": ("Paris", "Rome", "Berlin", "Madrid"),
    "t5": ("Paris", "Rome", "Berlin", "Madrid"),
    "bart": ("Paris", "Rome", "Berlin", "Madrid"),
    "bert": ("LABEL_0", "LABEL_1", "LABEL_2"),
}
SMALL = dict(rank=8, step_size=1e-2)
OPTIONS = {
    "ke": dict(hidden=8, condition=16),
    "ft": dict(max_steps=3),
    "ft_kl": dict(max_steps=3),
    "ft_one_layer": dict(max_steps=3),
    "ft_breadth_first": dict(epochs=3),
    "ultraedit": dict(learning_rate=1e-3),
    "lora": dict(max_steps=3, rank=2),
    "rome": dict(steps=2, prefixes=1, words=4),
    "memit": dict(steps=2, prefixes=1, words=4, weight=10.0),
}
CAUSAL_ONLY = ("rome", "memit")
SUBJECTS = {"What is 1?": "1", "What is it that 2 says?": "2"}  # of edits()


def sampler(name: str, **options) -> FactSampler:
    answers = ANSWERS[name]
    items = [
        Item((f"What is {i}?", f"Tell me of {i}"), answers[i % len(answers)], "relation", str(i)) for i in range(9)
    ]
    return FactSampler(items, **options)


def training(**changes) -> TrainConfig:
    settings = dict(steps=2, batch_size=2, warmup=1, validate_every=0, checkpoint_every=2)
    return TrainConfig(**{**settings, **changes})


def base(name: str, tokenizer) -> torch.nn.Module:
    model = make_model(name)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():  # every token is as likely as those that were there before
        for module in {model.get_input_embeddings(), model.get_output_embeddings()} - {None}:
            module.weight.normal_(0, 0.15)
    return model


def make(key: str, name: str, tokenizer, **options):
    torch.manual_seed(0)
    options = {**OPTIONS.get(key, {}), **options}
    system = make_system(key, base(name, tokenizer), tokenizer, MendConfig(**SMALL), **options)
    system.subjects = SUBJECTS
    return system


def outputs(system, name: str) -> torch.Tensor:
    pairs = [("What is 4?", ANSWERS[name][0]), ("Tell me of 5, now", ANSWERS[name][1])]
    with torch.no_grad():
        return kept_rows(system.subject.model, system.subject.tokenize(pairs)).logits


def edits(name: str) -> list[tuple[str, str]]:
    return [("What is 1?", ANSWERS[name][2]), ("What is it that 2 says?", ANSWERS[name][0])]


# -- all of them -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "t5", "bert"])
@pytest.mark.parametrize("key", SYSTEMS)
def test_every_system_edits_every_kind_of_model_and_leaves_it_as_it_was(key, name, tokenizer):
    model = base(name, tokenizer)
    callers = state(model)
    if key in CAUSAL_ONLY and name != "gpt2":
        with pytest.raises(ValueError, match="edits causal language models; this is a"):
            make_system(key, model, tokenizer, MendConfig(**SMALL), **OPTIONS[key])
        return
    system = make_system(key, model, tokenizer, MendConfig(**SMALL), **OPTIONS.get(key, {}))
    system.subjects = SUBJECTS
    assert (system.key, system.name) == (key, SYSTEMS[key].name)
    metrics = system.fit(sampler(name), training(joint=[1, 2]), progress=False)
    assert all(torch.isfinite(torch.tensor(value)) for value in metrics.values())
    assert same_bits(model, callers), "fitting changed the caller's model"
    before, old = state(system.subject.model), outputs(system, name)
    with system.edit(edits(name)) as edited:
        assert edited is system.subject.model
        assert not torch.equal(outputs(system, name), old)
    assert system.seconds > 0
    with pytest.raises(KeyError), system.edit(edits(name)[:1]):
        raise KeyError
    assert same_bits(system.subject.model, before) and same_bits(model, callers)
    assert torch.equal(outputs(system, name), old)
    assert all(parameter.grad is None for parameter in system.subject.model.parameters())
    assert not system.subject.model.training


def test_predict_asks_the_model_as_it_is_now(tokenizer):
    system = make("ft", "bert", tokenizer, max_steps=50)
    (old,) = system.predict(["What is 1?"])
    new = next(label for label in ANSWERS["bert"] if label != old)
    with system.edit([("What is 1?", new)]):
        assert system.predict(["What is 1?"]) == [new]
    assert system.predict(["What is 1?"]) == [old]


@pytest.mark.parametrize("key", SYSTEMS)
def test_what_is_saved_is_what_is_loaded(key, tokenizer, tmp_path):
    system = make(key, "gpt2", tokenizer)
    system.fit(sampler("gpt2"), training(learning_rate=0.1), progress=False)
    system.save(tmp_path / key)
    again = make(key, "gpt2", tokenizer)
    again.load(tmp_path / key)
    with system.edit(edits("gpt2")), again.edit(edits("gpt2")):
        assert torch.equal(outputs(system, "gpt2"), outputs(again, "gpt2"))


class Interrupted(FactSampler):
    """Data that is cut off before ``at``."""

    at = 5

    def draw(self, step, size):
        if step == self.at:
            raise KeyboardInterrupt
        return super().draw(step, size)


@pytest.mark.parametrize("key", ["enn", "ke", "mend"])
def test_a_run_that_was_cut_off_ends_in_the_same_bits(key, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("mendfast.training.loop.write_report", lambda directory: None)  # figures take long to draw
    config = training(steps=7, joint=[1, 2], validate_every=3, validation_size=2)
    facts, validation = sampler("gpt2"), sampler("gpt2", seed=1)
    whole = make(key, "gpt2", tokenizer)
    expected = whole.fit(facts, config, output=tmp_path / "whole", validation=validation, progress=False)
    with pytest.raises(KeyboardInterrupt):
        make(key, "gpt2", tokenizer).fit(
            Interrupted(facts.items), config, output=tmp_path / "cut", validation=validation, progress=False
        )
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    rest = make(key, "gpt2", tokenizer)
    # What it starts from must come from the checkpoint.
    with torch.no_grad():
        for parameter in rest.network.parameters() if key != "mend" else rest.subject.parameters():
            parameter.add_(1)
    got = rest.fit(facts, config, output=tmp_path / "cut", validation=validation, progress=False)
    logs = [(tmp_path / run / "metrics.jsonl").read_text() for run in ("whole", "cut")]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) == 7
    last = json.loads(logs[0].splitlines()[-1])
    assert {"val_loss", "edit_success", "l_edit", "l_loc"} <= set(last)
    assert last.items() <= expected.items() and last.items() <= got.items()
    with whole.edit(edits("gpt2")), rest.edit(edits("gpt2")):
        assert torch.equal(outputs(whole, "gpt2"), outputs(rest, "gpt2"))
    again = rest.fit(facts, config, output=tmp_path / "cut", validation=validation, progress=False)
    assert last.items() <= again.items(), "a run that is over gives its last figures again"
    if key != "mend":
        best = make(key, "gpt2", tokenizer)
        best.load(tmp_path / "cut" / "best")
        with pytest.raises(ValueError, match="batch_size"):
            best.fit(facts, training(batch_size=3), output=tmp_path / "cut", progress=False)


@pytest.mark.parametrize(("key", "options"), [("enn", dict(learning_rate=5e-4, rate=0.03)), ("ke", {})])
def test_training_lowers_the_loss(key, options, tokenizer, tmp_path):
    system = make(key, "bert", tokenizer, **options)
    config = training(steps=16, batch_size=3, learning_rate=3e-2)
    facts, asked = sampler("bert", loc=1), sampler("bert", loc=1, seed=5).draw(0, 9)

    def loss():
        return sum(part.item() for part, _ in system.losses(asked, config, 1))

    before = loss()
    system.fit(facts, config, output=tmp_path, progress=False)
    assert loss() < 0.9 * before
    assert {"curves.png", "report.html", "metrics.jsonl", "last"} <= {path.name for path in tmp_path.iterdir()}


def test_steps_that_are_not_finite_are_skipped_and_ten_in_a_row_stop(tokenizer):
    system = make("ke", "bert", tokenizer)
    losses, calls, bad = system.losses, [], {1}

    def poisoned(draw, config, joint):
        calls.append(len(calls))
        for total, metrics in losses(draw, config, joint):
            yield total * (torch.nan if calls[-1] in bad else 1), metrics

    system.losses = poisoned
    system.fit(sampler("bert"), training(steps=3), progress=False)
    assert len(calls) == 3 and all(p.isfinite().all() for p in system.network.parameters())
    bad.update(range(100))
    with pytest.raises(TrainingError, match="KE: 10 steps in a row"):
        system.fit(sampler("bert"), training(steps=30), progress=False)


@pytest.mark.parametrize("name", ["gpt2", "t5", "bert"])
def test_training_starts_from_the_best_plain_gradient_step(name, tokenizer):
    config, drawn = training(c_edit=2.0), sampler(name).draw(0, 4)
    enn = make("enn", name, tokenizer)
    subject, losses, spared = enn.subject, {}, {}
    for rate in GRADIENT_STEPS:
        enn.network.log_rates.data.fill_(math.log(rate))
        parts = [(loss.item(), metrics["l_loc"].item() / 4) for loss, metrics in enn.losses(drawn, config, 1)]
        # With the unedited model's own loss, which is the same at every rate.
        losses[rate], spared[rate] = map(sum, zip(*parts, strict=True))
    best = min((rate for rate in losses if spared[rate] <= STARTING_KL), key=losses.get)
    assert best_gradient_step(subject, drawn, config) == best
    assert min(losses.values()) < losses[best] or best != GRADIENT_STEPS[0]
    enn = make("enn", name, tokenizer, steps=2)
    enn.start(drawn, config)
    torch.testing.assert_close(enn.network.log_rates.exp(), torch.full_like(enn.network.log_rates, best / 2))
    ke = make("ke", name, tokenizer)
    ke.start(drawn, config)
    for conditioner in ke.network.conditioners:
        assert conditioner.log_scale.item() == pytest.approx(math.log(2 * best), rel=1e-4)
    for key in ("enn", "ke"):
        fixed = make(key, name, tokenizer, rate=0.5)
        before = {name: parameter.clone() for name, parameter in fixed.trained().items()}
        fixed.start(drawn, config)
        assert all(torch.equal(before[name], parameter) for name, parameter in fixed.trained().items())


def test_parameter_counts(tokenizer):
    """Of a GPT-2 of width 32 whose last three blocks' c_fc (32 -> 128) and c_proj (128 -> 32) are edited."""

    def block(width, modes=3):
        return 2 * 8 * width + width + 2 * modes * width  # U, V; b; s, o

    def conditioner(m, n):
        outputs = 2 * (m + n) + 1
        return (16 * 8 + 2 * 8) + (8 * outputs + 2 * outputs) + 1  # weights, each row's norm and bias, the scale

    count = {key: make(key, "gpt2", tokenizer).parameter_count() for key in SYSTEMS}
    base_model = base("gpt2", tokenizer)
    lstm = 2 * 4 * (8 * 32 + 8 * 8 + 2 * 8)
    assert count == {
        "ft": 0,
        "ft_kl": 0,
        "ft_one_layer": 0,
        "ft_breadth_first": 0,
        "ultraedit": 0,
        "lora": 0,
        "in_context": 0,
        "rome": 0,
        "memit": 0,
        "identity": 0,
        "enn": sum(p.numel() for p in base_model.parameters()) + 6,
        "ke": (len(tokenizer) + 2) * 32 + lstm + (16 * 16 + 16) + 3 * (conditioner(32, 128) + conditioner(128, 32)),
        "mend": 2 * 2 * block(160) + 6,
        "mend_sum": 2 * 2 * block(160) + 6,
        "malmen": 2 * 2 * block(160) + 3 * 6,
        "mend_no_sharing": 6 * 2 * block(160, modes=0) + 6,
        "mend_no_norm": 2 * 2 * block(160) + 6,
        "mend_no_identity": 2 * 2 * block(160) + 6,
        "mend_only_u": 2 * block(32) + 2 * block(128) + 6,
        "mend_only_delta": 2 * block(128) + 2 * block(32) + 6,
        "mend_only_smaller": 2 * 2 * block(32) + 6,
    }


def test_bad_input(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="'mend_no_sharin'.*mend_no_sharing"):
        make("mend_no_sharin", "gpt2", tokenizer)
    system = make("ft", "gpt2", tokenizer)
    with pytest.raises(ValueError, match="no requests"), system.edit([]):
        pass
    with pytest.raises(ValueError, match="target"), system.edit([("What is 1?", " ")]):
        pass
    with pytest.raises(ValueError, match="no facts"):
        system.fit(FactSampler([]), training())
    tuned = make("ft_kl", "gpt2", tokenizer)
    with pytest.raises(ValueError, match="call fit"), tuned.edit(edits("gpt2")):
        pass
    with pytest.raises(FileNotFoundError, match="no FT\\+KL was saved"):
        tuned.load(tmp_path)
    with pytest.raises(ValueError, match="steps is 0"):
        make("enn", "gpt2", tokenizer, steps=0)
    make("ke", "gpt2", tokenizer).save(tmp_path)
    with pytest.raises(ValueError, match="'ke' for a gpt2 model; this is 'enn'"):
        make("enn", "gpt2", tokenizer).load(tmp_path)
    with pytest.raises(ValueError, match="other settings: .*lstm"):
        make("ke", "gpt2", tokenizer, hidden=9).load(tmp_path)
    make("mend", "gpt2", tokenizer).save(tmp_path / "mend")
    with pytest.raises(ValueError, match="no editor for MEND, no sharing: its shared differ"):
        make("mend_no_sharing", "gpt2", tokenizer).load(tmp_path / "mend")


# -- fine-tuning -------------------------------------------------------------------------------------------


def test_fine_tuning_stops_when_learned_and_gives_up_at_the_maximum(tokenizer):
    system = make("ft", "gpt2", tokenizer, max_steps=50, learning_rate=3e-2)
    with system.edit(edits("gpt2")):
        assert correct(system.subject, edits("gpt2")).all()
        learned = system.steps
        with system.edit(edits("gpt2")):
            assert system.steps == 0, "there was nothing left to learn"
    assert 0 < learned < 50
    fewer = make("ft", "gpt2", tokenizer, max_steps=learned - 1, learning_rate=3e-2)
    with fewer.edit(edits("gpt2")):
        assert not correct(fewer.subject, edits("gpt2")).all()
    assert fewer.steps == learned - 1


def test_fine_tuning_with_kl_moves_other_answers_less(tokenizer):
    facts, moved = sampler("gpt2"), {}
    for system in (
        make("ft", "gpt2", tokenizer, max_steps=60),
        make("ft_kl", "gpt2", tokenizer, max_steps=60, c_loc=3.0, batch_size=4, sample_size=6),
    ):
        system.fit(facts, training(), progress=False)
        old = outputs(system, "gpt2")
        with system.edit(edits("gpt2")):
            assert correct(system.subject, edits("gpt2")).all()
            moved[type(system)] = ops.kl_divergence_rows(old, outputs(system, "gpt2")).mean().item()
    assert len(system.sample) == 6
    assert 0 < moved[FineTuningKL] < 0.7 * moved[FineTuning]


# -- editable neural networks ------------------------------------------------------------------------------


def enn(name: str, tokenizer, **options) -> tuple[EditableNetwork, list]:
    """A system in float64, where a step moves the weights far, and the batches of one edit."""
    editor = MendEditor.from_model(base(name, tokenizer).double(), tokenizer, MendConfig(**SMALL))
    system = EditableNetwork(editor, rate=0.3, **options)
    system.network.double()
    return system, [system.subject.tokenize(pairs) for pairs in sampler(name).draw(0, 2)]


def meta_gradient(system: EditableNetwork, batches: list) -> dict[str, torch.Tensor]:
    total, _ = system.loss(*batches, training(c_edit=1.5, c_loc=0.5))
    trained = system.trained()
    return dict(zip(trained, torch.autograd.grad(total, list(trained.values())), strict=True))


@pytest.mark.parametrize("name", ["gpt2", "bart", "bert"])  # T5 normalises in float32, whatever it is given
def test_the_meta_gradient_is_that_of_finite_differences(name, tokenizer):
    system, batches = enn(name, tokenizer, steps=2)
    gradients = meta_gradient(system, batches)
    generator = torch.Generator().manual_seed(0)
    edited = {f"model.{layer.name}" for layer in system.subject.layers}
    for chosen in (edited, {"log_rates"}, set(gradients) - edited):
        directions = {
            key: torch.randn(p.shape, generator=generator, dtype=torch.float64)
            for key, p in system.trained().items()
            if key in chosen
        }
        step, values = 1e-5, []
        with torch.no_grad():
            for sign in (1, -1):
                for key, direction in directions.items():
                    system.trained()[key].add_(direction, alpha=sign * step)
                values.append(system.loss(*batches, training(c_edit=1.5, c_loc=0.5))[0].item())
                for key, direction in directions.items():
                    system.trained()[key].sub_(direction, alpha=sign * step)
        numeric = (values[0] - values[1]) / (2 * step)
        exact = sum((gradients[key] * direction).sum().item() for key, direction in directions.items())
        assert abs(numeric - exact) < 1e-5 * max(1, abs(exact)), chosen


def test_first_order_leaves_the_gradients_of_the_steps_out(tokenizer):
    second, batches = enn("gpt2", tokenizer)
    first, _ = enn("gpt2", tokenizer, first_order=True)
    ours, theirs = meta_gradient(second, batches), meta_gradient(first, batches)
    # The rate multiplies the gradient, so with one step its own derivative knows no second order.
    torch.testing.assert_close(ours["log_rates"], theirs["log_rates"], rtol=1e-9, atol=0)
    for layer in second.subject.layers:
        a, b = ours[f"model.{layer.name}"], theirs[f"model.{layer.name}"]
        assert (a - b).norm() > 1e-2 * b.norm()


def test_an_edit_is_steps_of_gradient_descent_and_simultaneous_edits_add_up(tokenizer):
    system, _ = enn("gpt2", tokenizer)
    model, layers = system.subject.model, system.subject.layers
    with torch.no_grad():
        system.network.log_rates.copy_(torch.linspace(-4, -2, len(layers)))
    moved = []
    for requests in (*([request] for request in edits("gpt2")), edits("gpt2")):
        batch = system.subject.tokenize(requests)
        expected = [gradient(model, layer, batch) for layer in layers]
        before = [layer.weight.detach().clone() for layer in layers]
        with system.edit(requests):
            moved.append([layer.weight.detach() - old for layer, old in zip(layers, before, strict=True)])
        for got, full, layer, rate in zip(
            moved[-1], expected, layers, torch.linspace(-4, -2, len(layers)).exp(), strict=True
        ):
            full = full if layer.layout == "out_in" else full.T
            # Hugging Face's own loss, the other side here, is float32.
            torch.testing.assert_close(got, -rate * full, rtol=1e-5, atol=1e-9)
    for one, two, both in zip(*moved, strict=True):
        torch.testing.assert_close(one + two, both, rtol=1e-9, atol=1e-15)


# -- KnowledgeEditor ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bert"])
def test_gates_have_their_shapes_and_bounds_and_make_the_update_of_the_equation(name, tokenizer):
    model = base(name, tokenizer)
    system = KnowledgeEditor(MendEditor.from_model(model, tokenizer, MendConfig(**SMALL)), hidden=8, condition=16)
    with torch.no_grad():  # wide gates, so that each matters
        for parameter in system.network.conditioners.parameters():
            parameter.mul_(3)
        for conditioner in system.network.conditioners:
            conditioner.log_scale.fill_(math.log(0.7))
    request = edits(name)[1:]
    batch = system.subject.tokenize(request)
    with torch.no_grad():
        gates = system.network(system.condition(batch))
    edit = system.edit_tokens(batch)
    before = [layer.weight.detach().clone() for layer in system.subject.layers]
    gradients = [gradient(model, layer, batch) for layer in system.subject.layers]
    edit.apply_(model)
    for layer, gate, old, grad in zip(system.subject.layers, gates, before, gradients, strict=True):
        assert gate.alpha.shape == gate.beta.shape == (1, layer.n)
        assert gate.gamma.shape == gate.delta.shape == (1, layer.m)
        assert 0 < gate.scale.item() < 0.7
        for softmax in (gate.alpha, gate.beta):
            assert (softmax > 0).all() and (softmax < 1).all()
            torch.testing.assert_close(softmax.sum(), torch.tensor(1.0))
        gating, shift = gate.alpha.T @ gate.gamma, gate.beta.T @ gate.delta
        assert gating.shape == grad.shape == (layer.n, layer.m)
        assert torch.linalg.matrix_rank(gating) == torch.linalg.matrix_rank(shift) == 1
        update = -gate.scale * (gating * grad + shift)
        update = update if layer.layout == "out_in" else update.T
        assert update.shape == layer.weight.shape
        torch.testing.assert_close(layer.weight.detach() - old, update, rtol=1e-3, atol=1e-6)
    edit.revert_(model)


@pytest.mark.parametrize("name", ["gpt2", "t5", "bert"])
def test_the_condition_is_input_old_answer_and_new_answer(name, tokenizer):
    system = make("ke", name, tokenizer)
    requests, words = edits(name), len(tokenizer)
    for (prompt, target), ids in zip(requests, system.condition(system.subject.tokenize(requests)), strict=True):
        ids = ids.tolist()
        first, second = ids.index(words), ids.index(words + 1)
        assert ids[:first] == tokenizer(prompt)["input_ids"]
        old, new = ids[first + 1 : second], ids[second + 1 :]
        if name == "bert":
            (old_label,) = answer(system.subject, [prompt])
            assert [old, new] == [[words + 2 + int(label[-1])] for label in (old_label, target)]
        else:
            assert new == tokenizer(f" {target}" if name == "gpt2" else target)["input_ids"]
            with frozen(system.subject.model):
                (expected,) = answer(system.subject, [prompt], max_new_tokens=8)
            assert old and tokenizer.decode(old, skip_special_tokens=True).strip() == expected
    with torch.no_grad():
        swapped = ([5, 6, words, 7, words + 1, 8], [5, 6, words, 8, words + 1, 7])
        gates = system.network([torch.tensor(ids) for ids in swapped])
    assert all(not torch.allclose(gate.gamma[0], gate.gamma[1]) for gate in gates)
