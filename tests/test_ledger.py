"""Nothing lost: what an apply and a revert make of hostile arguments, foreign writes, copies and conversions."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import time

import pytest
import torch
from conftest import make_batch, make_model
from test_editor import SMALL, logits, same_bits, state, trained

import mendfast
from mendfast import Edit, MendConfig, MendEditor, forget_edits, revert_all
from mendfast.ledger import ledger_of
from mendfast.updates import checksum

LAYERS = ["transformer.h.2.mlp.c_proj.weight", "transformer.h.3.mlp.c_fc.weight"]
WEIGHT = LAYERS[1]


@pytest.fixture(scope="module")
def edits() -> list[Edit]:
    editor = trained(make_model("gpt2"), "gpt2", layers=LAYERS)
    return [editor.edit_tokens(make_batch("gpt2", seed=seed)) for seed in range(4)]


@pytest.fixture
def model() -> torch.nn.Module:
    return make_model("gpt2")


def with_factors(edit: Edit, change) -> Edit:
    return Edit({name: change(*factor) for name, factor in edit.factors.items()})


class TestRefusals:
    @pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_refused_apply_leaves_earlier_edits(self, edits, model, rounding, dtype):
        a, b, c, _ = edits
        model, wrong = model.to(dtype), dict(rounding="stochastic", seed=-1)
        before = state(model)
        a.apply_(model)
        b.apply_(model, rounding=rounding, seed=3)
        applied = state(model)
        refused = [
            (ValueError, "seed is -1", lambda: c.apply_(model, **wrong)),
            (ValueError, "seed is 'x'", lambda: c.apply_(model, seed="x")),
            (ValueError, "seed", lambda: c.apply_(model, rounding="stochastic", seed=2**63 - 1)),
            (TypeError, "int64", lambda: with_factors(c, lambda u, d, s: (u.long(), d, s)).apply_(model)),
            (TypeError, "complex64", lambda: with_factors(c, lambda u, d, s: (u, d + 0j, s)).apply_(model)),
            (TypeError, "sparse", lambda: with_factors(c, lambda u, d, s: (u.to_sparse(), d, s)).apply_(model)),
            (TypeError, "alpha", lambda: with_factors(c, lambda u, d, s: (u, d, "1")).apply_(model)),
            (ValueError, "NaN", lambda: with_factors(c, lambda u, d, s: (u, d, float("nan"))).apply_(model)),
            (ValueError, "NaN", lambda: with_factors(c, lambda u, d, s: (u, d / 0, s)).apply_(model)),
            (ValueError, "applied to the model already", lambda: a.apply_(model)),
            (ValueError, "backup is", lambda: c.apply_(model, backup="disk")),
            (ValueError, "rounding is", lambda: c.apply_(model, rounding="up")),
        ]
        for kind, message, call in refused:
            with pytest.raises(kind, match=message):
                call()
            assert same_bits(model, applied)
        with mendfast.backend("cuda"), pytest.raises(RuntimeError, match="cuda"):
            c.apply_(model)
        assert same_bits(model, applied)
        a.revert_(model)
        b.revert_(model)
        assert same_bits(model, before)

    @pytest.mark.parametrize("backup", ["cpu", "none"])
    def test_an_infinite_result(self, edits, model, backup):
        model = model.half()
        edits[0].apply_(model, backup=backup)
        before = state(model)
        huge = with_factors(edits[1], lambda u, d, s: (u, d, s * 1e8))
        with pytest.raises(ValueError, match="would hold infinity.*float16"):
            huge.apply_(model, backup=backup)
        assert same_bits(model, before)
        edits[1].apply_(model, backup=backup)

    def test_what_two_updates_hold_together_does_not_overflow_apart(self, model):
        model = model.half()
        u, delta = torch.ones(1, 32), torch.ones(1, 128)
        up, down = (Edit({WEIGHT: (u, delta, alpha)}) for alpha in (4e4, -6e4))
        down.apply_(model)
        up.apply_(model)
        more = Edit({WEIGHT: (u, delta, -3e4)}).apply_(model)
        before = state(model)
        with pytest.raises(ValueError, match="infinity"):
            up.revert_(model)
        assert same_bits(model, before)
        Edit.revert_many([up, more], model)

    def test_an_earlier_update_replays_by_the_backend_that_made_it(self, edits, model):
        model = model.bfloat16()
        clean = copy.deepcopy(model)
        edits[0].apply_(model)
        with mendfast.backend("reference"):
            edits[1].apply_(model)
            edits[1].apply_(clean)
        edits[0].revert_(model)
        assert same_bits(model, clean.state_dict())


def test_the_factors_are_the_ledgers_own(edits, model):
    edit = with_factors(edits[0], lambda u, d, s: (u.clone(), d.clone(), s))
    clean = copy.deepcopy(model)
    edits[1].apply_(model)
    edit.apply_(model)
    edit.apply_(clean)
    for u, delta, _ in edit.factors.values():
        u.zero_()
        delta.fill_(7)
    edits[1].revert_(model)
    assert same_bits(model, clean.state_dict())
    edit.revert_(model)


class TestForeignWrites:
    WRITES = {
        "data.add_": lambda m: m.get_parameter(WEIGHT).data.add_(1e-3),
        "data = ": lambda m: setattr(m.get_parameter(WEIGHT), "data", m.get_parameter(WEIGHT).data * 2),
        "one element": lambda m: m.get_parameter(WEIGHT).data[3, 5].mul_(1.01),
        "rows swapped": lambda m: m.get_parameter(WEIGHT).data.copy_(m.get_parameter(WEIGHT).data.flip(0)),
        "columns swapped": lambda m: m.get_parameter(WEIGHT).data.copy_(m.get_parameter(WEIGHT).data.flip(1)),
        "no_grad": torch.no_grad()(lambda m: m.get_parameter(WEIGHT).sub_(1e-3)),
        "load_state_dict": lambda m: m.load_state_dict(make_model("gpt2", seed=5).state_dict()),
        "half and back": lambda m: m.half().float(),
    }

    @pytest.mark.parametrize("how", WRITES)
    def test_are_kept(self, edits, model, how):
        edits[0].apply_(model)
        self.WRITES[how](model)
        before = state(model)
        for call in (edits[0].revert_, edits[1].apply_, revert_all, edits[0].fidelity):
            with pytest.raises(ValueError, match="written by something else.*forget_edits"):
                call(model)
            assert same_bits(model, before)
        forget_edits(model)
        edits[0].apply_(model).revert_(model)
        assert same_bits(model, before)

    def test_a_weight_that_was_not_edited_may_be_written(self, edits, model):
        edits[0].apply_(model)
        model.transformer.h[0].mlp.c_fc.weight.data.add_(1)
        edits[0].revert_(model)

    def test_the_same_bits_written_again(self, edits, model):
        before = state(model)
        edits[0].apply_(model)
        model.load_state_dict(state(model))
        edits[0].revert_(model)
        assert same_bits(model, before)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 64), (128, 70), (0, 4)])
    def test_the_checksum(self, dtype, shape):
        values = torch.randn(shape).to(dtype)
        total = checksum(values)
        assert total == checksum(values.clone()) == checksum(values.T.contiguous().T)
        wide = torch.zeros(shape[0], shape[1] + 3, dtype=dtype)
        wide[:, 1:-2] = values
        assert total == checksum(wide[:, 1:-2])
        for i in range(min(values.numel(), 40)):
            changed = values.clone()
            changed.view(-1)[-1 - i] *= -1
            assert checksum(changed) != total


class TestContent:
    def test_the_same_file_twice(self, edits, model, tmp_path):
        edits[0].save(tmp_path / "fact.safetensors")
        one, two = (Edit.load(tmp_path / "fact.safetensors") for _ in range(2))
        before = state(model)
        one.apply_(model)
        once = state(model)
        with pytest.raises(ValueError, match="same factors is applied to the model already.*again=True"):
            two.apply_(model)
        assert same_bits(model, once)
        two.apply_(model, again=True)
        twice = state(model)
        one.apply_(model, again=True)
        assert not same_bits(model, once) and not same_bits(model, twice)
        one.revert_(model)
        assert same_bits(model, twice)
        Edit.load(tmp_path / "fact.safetensors").revert_(model)  # the newest with this content
        assert same_bits(model, once)
        one.revert_(model)
        assert same_bits(model, before)
        with pytest.raises(ValueError, match="not applied"):
            two.revert_(model)

    def test_edits_that_change_nothing_are_no_doubles(self, model):
        empty = [Edit({WEIGHT: (torch.zeros(0, 32), torch.zeros(0, 128), 1.0)}) for _ in range(2)]
        for edit in empty:
            edit.apply_(model)
        for edit in empty:
            edit.revert_(model)

    def test_a_deepcopy_carries_its_edits(self, edits, model):
        before = state(model)
        edits[0].apply_(model)
        edits[1].apply_(model)
        copied = copy.deepcopy(model)
        edits[0].revert_(copied)
        edits[1].revert_(copied)
        assert same_bits(copied, before) and not same_bits(model, before)
        edits[1].revert_(model)
        edits[0].revert_(model)
        assert same_bits(model, before)

    def test_a_pickled_model_says_that_it_does_not_know(self, edits, model):
        edits[0].apply_(model)
        file = io.BytesIO()
        torch.save(model, file)
        assert b"mendfast.ledger" not in file.getvalue()
        file.seek(0)
        again = torch.load(file, weights_only=False)
        with pytest.raises(ValueError, match="not applied.*pickled"):
            edits[0].revert_(again)
        edits[1].apply_(again).revert_(again)


class TestConversions:
    @pytest.mark.parametrize("before", [True, False])
    @pytest.mark.parametrize("after", [True, False])
    def test_half_between_apply_and_revert(self, edits, model, before, after):
        """What a model would be that was converted without the edit."""
        a, b, c, _ = edits
        clean = copy.deepcopy(model)
        a.apply_(model)
        if before:
            b.apply_(model)
            b.apply_(clean)
        model.half()
        clean.half()
        if after:
            c.apply_(model, rounding="stochastic")
            c.apply_(clean, rounding="stochastic")
        a.revert_(model)
        assert same_bits(model, clean.state_dict())
        revert_all(model)
        assert same_bits(model, make_model("gpt2").half().state_dict())

    def test_to_another_device_and_dtype_and_back(self, edits, model):
        edits[0].apply_(model)
        model.double()
        with pytest.raises(ValueError, match="applied to the model already"):
            edits[0].apply_(model)
        edits[1].apply_(model)
        edits[0].revert_(model)
        edits[1].revert_(model)
        assert same_bits(model, make_model("gpt2").double().state_dict())

    def test_written_after_a_conversion(self, edits, model):
        edits[0].apply_(model)
        model.half().get_parameter(WEIGHT).data[0, 0] += 1
        with pytest.raises(ValueError, match="something else"):
            edits[0].revert_(model)

    def test_a_module_that_was_put_in_its_place(self, edits, model):
        edits[0].apply_(model)
        model.transformer.h[3].mlp = copy.deepcopy(make_model("gpt2", seed=3).transformer.h[3].mlp)
        with pytest.raises(ValueError, match="something else"):
            edits[0].revert_(model)


class TestMany:
    def test_revert_many_and_all(self, edits, model):
        model = model.bfloat16()
        before, clean = state(model), copy.deepcopy(model)
        for i, edit in enumerate(edits):
            edit.apply_(model, rounding=("nearest", "stochastic")[i % 2], seed=i)
        edits[1].apply_(clean, rounding="stochastic", seed=1)
        with pytest.raises(ValueError, match="not applied"):
            Edit.revert_many([*edits[2:], edits[0], with_factors(edits[0], lambda u, d, s: (2 * u, d, s))], model)
        Edit.revert_many([*edits[2:], edits[0]], model)
        assert same_bits(model, clean.state_dict())
        revert_all(model)
        revert_all(model)
        assert same_bits(model, before)

    def test_replace(self, edits, model):
        clean, before, handle = copy.deepcopy(model), state(model), object()
        ledger = ledger_of(model)
        ledger.replace(handle, edits[0].factors)
        edits[1].apply_(model)
        ledger.replace(handle, {WEIGHT: edits[2].factors[WEIGHT]})
        edits[1].apply_(clean)
        ledger_of(clean).apply(handle, {WEIGHT: edits[2].factors[WEIGHT]})
        assert same_bits(model, clean.state_dict())
        ledger.replace(handle, {})
        edits[1].revert_(model)
        assert same_bits(model, before)

    def test_299_stacked_edits_come_out_oldest_first(self, model):
        """Each revert replays those that stay, of which there are 45,000 altogether: 25 s once."""
        before, generator = state(model), torch.Generator().manual_seed(0)
        edits = [
            Edit({
                name: (torch.randn(3, m, generator=generator), torch.randn(3, n, generator=generator), 1e-3)
                for name, m, n in zip(LAYERS, (128, 32), (32, 128), strict=True)
            })
            for _ in range(299)
        ]  # fmt: skip
        for edit in edits:
            edit.apply_(model)
        full = state(model)
        started = time.process_time()
        for edit in edits:
            edit.revert_(model)
        assert same_bits(model, before) and time.process_time() - started < 15
        for edit in edits:
            edit.apply_(model)
        assert same_bits(model, full)
        started = time.process_time()
        Edit.revert_many(edits, model)
        assert same_bits(model, before) and time.process_time() - started < 1


class TestWrapped:
    def test_save_pretrained_while_attached(self, edits, model, tmp_path):
        with edits[0].attached(model):
            with edits[1].attached(model):
                pass
            for call in (model.save_pretrained, torch.compile(model).save_pretrained):
                with pytest.raises(RuntimeError, match="apply_.*mendfast apply"):
                    call(tmp_path / "model")
            copied = copy.deepcopy(model)
        assert not (tmp_path / "model").exists() and "save_pretrained" not in vars(model)
        model.save_pretrained(tmp_path / "model")
        copied.save_pretrained(tmp_path / "copied")
        batch = make_batch("gpt2")
        assert torch.equal(logits(copied, batch), logits(model, batch))

    @pytest.mark.parametrize("how", ["wrapper", "in place", "a block", "a function"])
    def test_a_compiled_model(self, edits, how):
        torch._dynamo.reset()
        model, batch, edit = make_model("gpt2"), make_batch("gpt2"), edits[0]
        plain = logits(model, batch)
        with edit.attached(model):
            attached = logits(model, batch)
        clean, call = state(model), model
        if how == "wrapper":
            model = call = torch.compile(model, backend="eager")
        elif how == "in place":
            model.compile(backend="eager")
        elif how == "a block":
            model.transformer.h[3] = torch.compile(model.transformer.h[3], backend="eager")
        else:
            call = torch.compile(lambda **batch: make_call(**batch), backend="eager")
            make_call = model
        torch.testing.assert_close(logits(call, batch), plain)
        with edit.attached(model):
            torch.testing.assert_close(logits(call, batch), attached)
            with edits[1].attached(model):
                pass
            torch.testing.assert_close(logits(call, batch), attached)
        torch.testing.assert_close(logits(call, batch), plain)
        editor = MendEditor.from_model(model, None, MendConfig(layers=LAYERS, **SMALL))
        assert editor.config.layers == LAYERS
        edit = editor.edit_tokens(batch)
        edit.apply_(model)
        assert not torch.allclose(logits(call, batch), plain)
        edit.revert_(model)
        assert all(torch.equal(v, clean[k.replace("_orig_mod.", "")]) for k, v in model.state_dict().items())

    def test_what_is_compiled_within_the_block_does_not_outlive_it(self):
        """Where the compiler is loaded by then."""
        script = """
import sys, torch
from mendfast import Edit
model = torch.nn.Sequential(torch.nn.Linear(4, 4))
edit = Edit({"0.weight": (torch.ones(1, 4), torch.ones(1, 4), 1.0)})
x, compiled = torch.ones(2, 4), None
plain = model(x)
assert "torch._dynamo" not in sys.modules
with edit.attached(model):
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(compiled(x), plain - 4)
    with edit.attached(model):
        assert torch.allclose(compiled(x), plain - 8)
    assert torch.allclose(compiled(x), plain - 4)
assert torch.allclose(compiled(x), plain)
"""
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    @pytest.mark.parametrize("wrap", [torch.nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
    def test_an_editor_of_a_wrapped_model(self, wrap):
        for name in ("gpt2", "bert"):
            model, batch = make_model(name), make_batch(name, left=name == "gpt2")
            expected = MendEditor.from_model(model, None, MendConfig(**SMALL)).edit_tokens(batch)
            made = MendEditor.from_model(wrap(model), None, MendConfig(**SMALL)).edit_tokens(batch)
            assert list(made.factors) == list(expected.factors)
            for one, two in zip(made.factors.values(), expected.factors.values(), strict=True):
                assert torch.equal(one.u, two.u) and torch.equal(one.delta, two.delta)

    def test_names_of_wrappers_are_looked_through(self, edits, model):
        before = state(model)
        compiled = torch.compile(model, backend="eager")
        renamed = Edit({f"_orig_mod.{name}": factor for name, factor in edits[0].factors.items()})
        for edit, target in ((renamed, model), (edits[0], compiled), (edits[0], torch.nn.DataParallel(model))):
            edit.apply_(target)
            assert not same_bits(model, before)
            edits[0].revert_(model)
            assert same_bits(model, before)
            with edit.attached(target):
                assert sum(len(m._forward_hooks) for m in model.modules()) == 2

    def test_inference_mode(self, edits, model):
        batch, before = make_batch("gpt2"), state(model)
        editor = MendEditor.from_model(model, None, MendConfig(layers=LAYERS, **SMALL))
        expected = editor.edit_tokens(batch)
        with torch.inference_mode():
            edit = editor.edit_tokens({name: value.clone() for name, value in batch.items()})
            with edit.attached(model):
                model(**batch)
            edit.apply_(model)
            edits[1].apply_(model)
            assert torch.is_inference_mode_enabled()
        edit.revert_(model)
        with torch.inference_mode():
            edits[1].revert_(model)
        assert same_bits(model, before)
        for name, (u, delta, _) in edit.factors.items():
            assert torch.equal(u, expected.factors[name].u) and torch.equal(delta, expected.factors[name].delta)
        with torch.inference_mode():
            made = make_model("gpt2")
        for call in (edits[0].apply_, lambda m: MendEditor(m, None, MendConfig(**SMALL)).edit_tokens(batch)):
            with pytest.raises(ValueError, match="made within torch.inference_mode.*load the model outside"):
                call(made)

    def test_train_mode_dropout_and_activation_checkpointing(self, edits):
        """An edit is made in eval mode whatever the model is in; an attached one is trained through."""
        model, batch = make_model("gpt2"), make_batch("gpt2")
        editor = MendEditor.from_model(model, None, MendConfig(layers=LAYERS, **SMALL))
        expected = editor.edit_tokens(batch)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.5
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for name, (u, delta, _) in editor.edit_tokens(batch).factors.items():
            assert torch.equal(u, expected.factors[name].u) and torch.equal(delta, expected.factors[name].delta)
        assert model.training and all(p.requires_grad for p in model.parameters())
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        gradients = []
        for apply in (False, True):
            if apply:
                edits[0].apply_(model)
            with edits[0].attached(model) if not apply else torch.enable_grad():
                model.zero_grad()
                model(**batch, use_cache=False).loss.backward()
            gradients.append(model.transformer.h[1].mlp.c_fc.weight.grad.clone())
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
        edits[0].revert_(model)
