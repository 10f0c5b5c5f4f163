"""MendEditor and Edit on every architecture."""

from __future__ import annotations

import random

import pytest
import torch
from conftest import SEQ2SEQ, make_batch, make_model
from hypothesis import given, settings
from hypothesis import strategies as st

from mendfast import Edit, EditRequest, MendConfig, MendEditor
from mendfast.capture import frozen
from mendfast.ledger import ledger_of

SMALL = dict(rank=8, step_size=1e-2)


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


def trained(model: torch.nn.Module, name: str, **config) -> MendEditor:
    """An editor with statistics and a network away from its initialisation."""
    editor = MendEditor.from_model(model, None, MendConfig(**{**SMALL, **config}))
    editor.train()
    for seed in range(3):
        editor.edit_tokens(make_batch(name, seed=seed))
    editor.eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in editor.named_parameters():
            if key.split(".")[-1] in ("U", "b", "o"):
                parameter.normal_(0, 0.05)
    return editor


def gradient(model: torch.nn.Module, layer, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The full gradient of the sum of the samples' mean losses, as autograd gives it, as [n, m]."""
    total = 0
    for i in range(len(batch["labels"])):
        one = {key: value[i : i + 1] for key, value in batch.items()}
        if "ForSequenceClassification" in type(model).__name__:
            z = model(**{k: v for k, v in one.items() if k != "labels"}).logits
            z = torch.cat([torch.zeros_like(z), z], -1) if z.shape[-1] == 1 else z
            total = total + torch.nn.functional.cross_entropy(z, one["labels"])
        else:
            total = total + model(**one).loss
    (grad,) = torch.autograd.grad(total, [layer.weight])
    return grad if layer.layout == "out_in" else grad.T


def test_gradients_are_those_of_autograd(architecture):
    model = make_model(architecture)
    batch = make_batch(architecture)
    editor = MendEditor.from_model(model, None, MendConfig(**SMALL))
    rows = editor.gradients(batch)
    for layer in editor.layers:
        u, delta = rows[layer.name]
        ours = torch.einsum("bsn,bsm->nm", delta, u)
        theirs = gradient(model, layer, batch)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


def test_automatic_choice(architecture):
    editor = MendEditor.from_model(make_model(architecture), None, MendConfig(**SMALL))
    names = editor.config.layers
    assert not any("attn" in n.lower() or "attention" in n.lower() for n in names)
    per_block = 3 if architecture in ("llama", "qwen2", "mistral", "gemma", "t5_gated") else 2
    blocks = 4 if architecture in SEQ2SEQ else 3
    assert len(names) == per_block * blocks
    if architecture in SEQ2SEQ:
        assert sum("encoder" in n for n in names) == sum("decoder" in n for n in names) == len(names) // 2
    else:
        assert not any(".0." in n for n in names)


def test_edit_tokens_leaves_the_model_alone(architecture):
    model = make_model(architecture).train()
    model.requires_grad_(True)
    before, flags = state(model), [p.requires_grad for p in model.parameters()]
    MendEditor.from_model(model, None, MendConfig(**SMALL)).edit_tokens(make_batch(architecture))
    assert same_bits(model, before)
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_attached_equals_apply_and_revert_is_bit_exact(architecture):
    model = make_model(architecture)
    edit = trained(model, architecture).edit_tokens(make_batch(architecture))
    batch, before = make_batch(architecture, seed=7), state(model)
    plain = logits(model, batch)
    with edit.attached(model):
        attached = logits(model, batch)
    assert same_bits(model, before)
    edit.apply_(model)
    applied = logits(model, batch)
    assert (applied - plain).abs().max() > 1e-4
    torch.testing.assert_close(attached, applied, rtol=1e-4, atol=1e-4)
    edit.revert_(model)
    assert same_bits(model, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_edits_stack_and_come_out_in_any_order(dtype, rounding):
    model = make_model("gpt2").to(dtype)
    editor = trained(model, "gpt2")
    edits = [editor.edit_tokens(make_batch("gpt2", seed=seed)) for seed in (4, 5, 6)]
    before = state(model)
    for seed, edit in enumerate(edits):
        edit.apply_(model, rounding=rounding, seed=100 * seed)
    with pytest.raises(ValueError, match="applied to the model already"):
        edits[0].apply_(model)
    edits[1].revert_(model)
    after_middle = state(model)
    edits[0].revert_(model)
    edits[2].revert_(model)
    assert same_bits(model, before)
    edits[0].apply_(model, rounding=rounding, seed=0)
    edits[2].apply_(model, rounding=rounding, seed=200)
    assert same_bits(model, after_middle)
    with pytest.raises(ValueError, match="not applied"):
        edits[1].revert_(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_sequences_of_apply_and_revert(dtype):
    """After 200 random steps, and on the way, the weights are those of a model that saw the remaining edits alone."""
    model = make_model("gpt2").to(dtype)
    editor, rng = trained(model, "gpt2"), random.Random(0)
    edits = [editor.edit_tokens(make_batch("gpt2", seed=seed)) for seed in range(5)]
    kinds = [("nearest", 0), ("stochastic", 10), ("nearest", 0), ("stochastic", 20), ("stochastic", 30)]
    untouched, applied = state(model), []
    for step in range(200):
        i = rng.randrange(len(edits))
        if i in applied:
            edits[i].revert_(model)
            applied.remove(i)
        else:
            edits[i].apply_(model, rounding=kinds[i][0], seed=kinds[i][1])
            applied.append(i)
        if step % 20 == 0:
            clean = make_model("gpt2").to(dtype)
            for j in applied:
                edits[j].apply_(clean, rounding=kinds[j][0], seed=kinds[j][1], backup="none")
            assert same_bits(clean, state(model)), (step, applied)
    for j in applied:
        edits[j].revert_(model)
    assert same_bits(model, untouched)


def test_revert_refuses_after_a_foreign_write():
    model = make_model("gpt2")
    edit = trained(model, "gpt2").edit_tokens(make_batch("gpt2"))
    edit.apply_(model)
    with torch.no_grad():
        model.transformer.h[3].mlp.c_fc.weight.mul_(1.5)
    before = state(model)
    with pytest.raises(ValueError, match="written by something else"):
        edit.revert_(model)
    assert same_bits(model, before)


def test_the_memory_of_a_backup_serves_the_next():
    model = make_model("gpt2")
    edit = trained(model, "gpt2").edit_tokens(make_batch("gpt2"))
    places = []
    for _ in range(3):
        with torch.no_grad():  # what was there before is no longer right
            model.transformer.h[3].mlp.c_fc.weight.mul_(1.5)
        before = state(model)
        edit.apply_(model)
        weights = ledger_of(model)._weights
        places.append({name: weight.backup.data_ptr() for name, weight in weights.items()})
        edit.revert_(model)
        assert same_bits(model, before)
    assert places[0] == places[1] == places[2]


def test_no_backup_no_revert():
    model = make_model("gpt2")
    edit = trained(model, "gpt2").edit_tokens(make_batch("gpt2"))
    edit.apply_(model, backup="none")
    with pytest.raises(ValueError, match="without a backup"):
        edit.revert_(model)


def test_fidelity():
    model = make_model("llama")
    edit = trained(model, "llama").edit_tokens(make_batch("llama"))
    with pytest.raises(ValueError, match="not applied"):
        edit.fidelity(model)
    edit.apply_(model)
    assert max(edit.fidelity(model).values()) < 1e-4
    edit.revert_(model)
    model.bfloat16()
    edit.apply_(model)
    fidelity = edit.fidelity(model)
    assert set(fidelity) == set(edit.factors) and 1e-4 < max(fidelity.values()) < 1


def test_failed_apply_leaves_every_weight():
    model = make_model("gpt2")
    edit = trained(model, "gpt2").edit_tokens(make_batch("gpt2"))
    last = list(edit.factors)[-1]
    edit.factors[last].delta[0, 0] = float("nan")
    before = state(model)
    with pytest.raises(ValueError, match=f"{last}.*NaN"):
        edit.apply_(model)
    assert same_bits(model, before)


def test_identity_at_initialisation(architecture):
    """delta W = -alpha sum of normalised rank-1 terms."""
    model, batch = make_model(architecture), make_batch(architecture)
    editor = MendEditor.from_model(model, None, MendConfig(**SMALL))
    editor.train()
    for seed in range(3):
        editor.edit_tokens(make_batch(architecture, seed=seed))
    editor.eval()
    edit, rows = editor.edit_tokens(batch), editor.gradients(batch)
    for key, members in editor._groups.items():
        net = editor.networks[key]
        for layer in members:
            u, delta = (side.flatten(0, 1).double() for side in rows[layer.name])
            keep = (u != 0).any(-1) & (delta != 0).any(-1)
            u = ((u - net.u_mean) / (net.u_std + 1e-7))[keep]
            delta = ((delta - net.delta_mean) / (net.delta_std + 1e-7))[keep]
            ours = edit.factors[layer.name]
            torch.testing.assert_close(ours.delta.double().T @ ours.u.double(), delta.T @ u, rtol=1e-5, atol=1e-5)
            assert ours.alpha == pytest.approx(1e-2)


def test_simultaneous_edits_are_the_sum_of_separate_ones(architecture):
    model, batch = make_model(architecture), make_batch(architecture)
    editor = trained(model, architecture)
    together = editor.edit_tokens(batch)
    alone = Edit.sum([editor.edit_tokens({k: v[i : i + 1] for k, v in batch.items()}) for i in range(3)])
    for name, factor in together.factors.items():
        one, two = (f.alpha * f.delta.T @ f.u for f in (factor, alone.factors[name]))
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4 * two.abs().max().item())


def test_batch_reduction_weighs_every_token_alike():
    model, batch = make_model("gpt2"), make_batch("gpt2")
    batch["labels"][0, : batch["labels"].shape[1] - 4] = -100
    editor = MendEditor.from_model(model, None, MendConfig(loss_reduction="batch", **SMALL))
    layer = editor.layers[0]
    u, delta = editor.gradients(batch)[layer.name]
    (grad,) = torch.autograd.grad(model(**batch).loss, [layer.weight])
    torch.testing.assert_close(torch.einsum("bsm,bsn->mn", u, delta), grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sides", ["both", "u", "delta", "smaller", "separate"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("identity_init", [True, False])
def test_variants(sides, shared, normalize, identity_init, tmp_path):
    model = make_model("gpt2")
    options = dict(sides=sides, shared=shared, normalize=normalize, identity_init=identity_init)
    editor = trained(model, "gpt2", **options)
    edit = editor.edit_tokens(make_batch("gpt2"))
    assert len(editor.networks) == (2 if shared else 6)
    net = next(iter(editor.networks.values()))
    assert (net.both is not None, net.u is not None, net.delta is not None) == {
        "both": (True, False, False),
        "u": (False, True, False),
        "delta": (False, False, True),
        "smaller": (False, net.m <= net.n, net.m > net.n),
        "separate": (False, True, True),
    }[sides]
    editor.save_pretrained(tmp_path)
    again = MendEditor.from_pretrained(tmp_path, model)
    assert again.config == editor.config
    for name, factor in again.edit_tokens(make_batch("gpt2")).factors.items():
        assert torch.equal(factor.u, edit.factors[name].u) and torch.equal(factor.delta, edit.factors[name].delta)
        assert factor.alpha == edit.factors[name].alpha


def test_one_sided_passes_the_other_side_on_normalised():
    model, batch = make_model("gpt2"), make_batch("gpt2")
    editor = trained(model, "gpt2", sides="u")
    rows, edit = editor.gradients(batch), editor.edit_tokens(batch)
    key, members = next(iter(editor._groups.items()))
    net, (u, delta) = editor.networks[key], rows[members[0].name]
    keep = (u != 0).any(-1) & (delta != 0).any(-1)
    expected = (delta[keep] - net.delta_mean) / (net.delta_std + 1e-7)
    torch.testing.assert_close(edit.factors[members[0].name].delta, expected)


def test_statistics_move_in_train_mode_alone():
    editor = MendEditor.from_model(make_model("gpt2"), None, MendConfig(**SMALL))
    editor.edit_tokens(make_batch("gpt2"))
    assert all(int(net.count) == 0 for net in editor.networks.values())
    editor.train()
    editor.edit_tokens(make_batch("gpt2"))
    seen = [int(net.count) for net in editor.networks.values()]
    assert min(seen) > 0 and not editor.model.training
    editor.eval()
    editor.edit_tokens(make_batch("gpt2"))
    assert [int(net.count) for net in editor.networks.values()] == seen


def test_the_editor_owns_itself_alone():
    model = make_model("gpt2")
    editor = MendEditor.from_model(model, None, MendConfig(**SMALL))
    ours = {id(p) for p in editor.parameters()}
    assert not ours & {id(p) for p in model.parameters()}
    assert not any(key.startswith("model") for key in editor.state_dict())
    assert model not in list(editor.modules())


@settings(max_examples=15, deadline=None)
@given(size=st.integers(1, 4), length=st.integers(6, 12), left=st.booleans(), seed=st.integers(0, 99))
def test_padding_does_not_change_an_edit(size, length, left, seed):
    """An edit means the same alone and in a batch, padded on either side."""
    for name in ("gpt2", "llama", "opt"):
        model = _MODELS.setdefault(name, make_model(name))
        editor = MendEditor.from_model(model, None, MendConfig(**SMALL))
        batch = make_batch(name, size, length, seed, left)
        edit = editor.edit_tokens(batch)
        parts = []
        for i in range(size):
            kept = batch["attention_mask"][i] == 1
            parts.append(editor.edit_tokens({k: v[i : i + 1, kept] for k, v in batch.items()}))
        total = Edit.sum(parts)
        for weight, factor in edit.factors.items():
            a, b = (f.delta.T @ f.u for f in (factor, total.factors[weight]))
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * max(1e-3, b.abs().max().item()))


_MODELS: dict[str, torch.nn.Module] = {}


def test_attached_edits_nest_and_sum():
    model = make_model("gpt2")
    editor = trained(model, "gpt2")
    one, two = (editor.edit_tokens(make_batch("gpt2", seed=s)) for s in (1, 2))
    batch = make_batch("gpt2", seed=9)
    with one.attached(model), two.attached(model):
        nested = logits(model, batch)
    with Edit.sum([one, two]).attached(model):
        summed = logits(model, batch)
    torch.testing.assert_close(nested, summed, rtol=1e-4, atol=1e-4)


def test_generate_with_an_attached_edit():
    model = make_model("gpt2")
    edit = trained(model, "gpt2").edit_tokens(make_batch("gpt2"))
    ids = make_batch("gpt2", size=1, seed=3)["input_ids"]
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    with edit.attached(model):
        attached = model.generate(ids, **options)
    edit.apply_(model)
    assert torch.equal(attached, model.generate(ids, **options))


def test_save_and_load(tmp_path, tokenizer):
    model = make_model("gpt2")
    model.resize_token_embeddings(len(tokenizer))
    editor = MendEditor.from_model(model, tokenizer, MendConfig(**SMALL))
    edit = editor.edit([EditRequest("What is the capital of France?", "Rome"), ("Capital?", "Berlin")])
    edit.save(tmp_path / "fact.safetensors")
    again = Edit.load(tmp_path / "fact.safetensors")
    assert again.requests == edit.requests and again.model_type == "gpt2"
    for name, factor in edit.factors.items():
        assert torch.equal(factor.u, again.factors[name].u) and torch.equal(factor.delta, again.factors[name].delta)
        assert factor.alpha == again.factors[name].alpha


def test_one_configuration_serves_several_models():
    config = MendConfig(**SMALL)
    for name in ("gpt2", "llama"):
        MendEditor.from_model(make_model(name), None, config).edit_tokens(make_batch(name))
    assert config.layers is None


@pytest.mark.parametrize("training", [False, True])
def test_a_target_that_is_certain_already_needs_no_update(training):
    """The gradient is exactly 0, and so is the edit."""
    model = make_model("gpt2").double()
    batch = make_batch("gpt2", size=1)
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(1e9)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    position = 4
    certain = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
    batch["input_ids"][0, position + 1 :] = certain[0, position]
    batch["labels"][0, position + 1] = certain[0, position]
    editor = MendEditor.from_model(model.float(), None, MendConfig(**SMALL)).train(training)
    edit = editor.edit_tokens(batch)
    assert all(len(factor.u) == 0 for factor in edit.factors.values())
    before = state(model)
    edit.apply_(model)
    assert same_bits(model, before)
    edit.revert_(model)


def test_frozen_restores_after_an_error():
    model = make_model("gpt2").train()
    with pytest.raises(RuntimeError, match="inside"), frozen(model):
        assert not model.training
        raise RuntimeError("inside")
    assert model.training and all(p.requires_grad for p in model.parameters())
