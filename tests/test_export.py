"""Edits as adapters: PEFT's own loader and llama.cpp's own reader make of them what the edit is."""

from __future__ import annotations

import json
import shutil
import warnings

import gguf
import peft
import pytest
import torch
from conftest import make_batch, make_model
from safetensors.torch import load_file, save_file

from mendfast import Edit
from mendfast.adapters.gguf import export_gguf_lora
from mendfast.adapters.peft import RANKS, digest_of
from mendfast.choice import choose_layers, find_layers

ARCHS = ("gpt2", "llama", "t5", "bert")


def make_edit(model, rows: int = 3, names=None, seed: int = 1, size: float = 0.3, alpha: float = 0.7) -> Edit:
    """Rows of very unlike sizes, one of them zeros, as edits have them."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for layer in find_layers(model, names):
        u = torch.randn(rows + 1, layer.m, generator=generator) * 1e3
        delta = torch.randn(rows + 1, layer.n, generator=generator) * size / 1e3 / layer.m**0.5
        u[-1] = 0
        factors[layer.name] = (u, delta, alpha)
    return Edit(factors, model.config.model_type, [("Capital of Kenya?", "Oslo")])


def dense(edit: Edit) -> dict[str, torch.Tensor]:
    return {name: -a * d.double().T @ u.double() for name, (u, d, a) in edit.factors.items()}


def logits(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("rank", [None, 2])
def test_peft_loads_what_the_edit_is(arch, rank, tmp_path):
    model, batch = make_model(arch), make_batch(arch)
    edit = make_edit(model)
    export = edit.export_peft(tmp_path / "adapter", model, rank)
    assert (export.rank, export.r) == ((3, 8) if rank is None else (2, 8))
    again = Edit.from_peft(tmp_path / "adapter", model)
    with (edit if rank is None else again).attached(model):
        expected = logits(model, batch)
    assert (expected - logits(model, batch)).abs().max() > 1e-2
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = peft.PeftModel.from_pretrained(make_model(arch), tmp_path / "adapter")
    assert torch.allclose(logits(loaded, batch), expected, atol=1e-4, rtol=0)
    touched = {name.split(".lora_A")[0] for name, _ in loaded.named_parameters() if "lora_A" in name}
    assert touched == {f"base_model.model.{name.removesuffix('.weight')}" for name in edit.factors}
    merged = loaded.merge_and_unload()
    edit.apply_(model) if rank is None else again.apply_(model)
    for (name, ours), theirs in zip(model.named_parameters(), merged.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5, rtol=0), name


@pytest.mark.parametrize("arch", ARCHS)
def test_round_trip(arch, tmp_path):
    model = make_model(arch)
    edit = make_edit(model)
    edit.export_peft(tmp_path / "adapter", model)
    again = Edit.from_peft(tmp_path / "adapter", model)
    assert again.requests == edit.requests and again.model_type == edit.model_type
    assert all(len(factor.u) == 3 for factor in again.factors.values())  # no row of zeros comes back
    found = dense(again)
    assert set(found) == set(edit.factors)
    assert all((found[name] - whole).norm() < 3e-7 * whole.norm() for name, whole in dense(edit).items())


@pytest.mark.parametrize("rows, rank", [(5, 2), (40, 7)])
def test_the_error_of_truncation_is_the_true_one(rows, rank, tmp_path, caplog):
    model = make_model("gpt2")
    edit = make_edit(model, rows)
    export = edit.export_peft(tmp_path / "adapter", model, rank)
    again = Edit.from_peft(tmp_path / "adapter", model)
    for name, whole in dense(edit).items():
        values = torch.linalg.svdvals(whole)
        best = float(values[rank:].norm() / values.norm())
        true = float((dense(again)[name] - whole).norm() / whole.norm())
        assert export.errors[name] == pytest.approx(best, rel=1e-6)
        assert true == pytest.approx(best, rel=1e-5)
    assert "Truncated to rank" in caplog.text


def test_more_rows_than_inputs_are_no_loss(tmp_path):
    model = make_model("gpt2")
    edit = make_edit(model, 50)  # matrices of 32 x 128
    export = edit.export_peft(tmp_path / "adapter", model)
    assert (export.rank, export.r) == (32, 32) and max(export.errors.values()) < 1e-12
    again = dense(Edit.from_peft(tmp_path / "adapter", model))
    assert all((again[name] - whole).norm() < 1e-6 * whole.norm() for name, whole in dense(edit).items())


def test_one_rank_padded_to_what_servers_take(tmp_path):
    model = make_model("llama")
    for rows, r in ((1, 1), (2, 8), (8, 8), (9, 16), (32, 32)):
        assert make_edit(model, rows).export_peft(tmp_path / str(rows), model).r == r
    config = json.loads((tmp_path / "2" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 8 and config["bias"] == "none" and "rank_pattern" not in config
    assert config["fan_in_fan_out"] is False and config["task_type"] == "CAUSAL_LM"
    assert RANKS == (1, 8, 16, 32, 64, 128, 256, 320, 512)


def test_a_rank_that_vllm_does_not_take_is_said(tmp_path, caplog):
    import transformers as hf

    config = hf.LlamaConfig(
        vocab_size=96, hidden_size=528, intermediate_size=528, num_hidden_layers=1, num_attention_heads=4
    )
    model, name = hf.LlamaForCausalLM(config), "model.layers.0.mlp.up_proj.weight"
    edit = make_edit(model, 520, [name])
    export = edit.export_peft(tmp_path / "adapter", model)
    assert export.r == 520 and "vLLM takes adapters up to 512" in export.notes[0] and "rank=512" in caplog.text
    assert edit.export_peft(tmp_path / "other", model, 512).r == 512


def test_the_name_follows_the_content(tmp_path):
    model = make_model("gpt2")
    first, same = (make_edit(model).export_peft(tmp_path / name, model) for name in "ab")
    other = make_edit(model, seed=2).export_peft(tmp_path / "c", model)
    assert first.lora_name == same.lora_name != other.lora_name
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["auto_mapping"]["mendfast_digest"] == first.digest
    assert digest_of(load_file(tmp_path / "a" / "adapter_model.safetensors")) == first.digest
    files = ("adapter_config.json", "adapter_model.safetensors")
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)


def test_no_module_beyond_the_edited_ones_is_taken(tmp_path):
    """A module whose name ends in the edited one's whole name: a list of names would match both."""
    model = make_model("gpt2")
    model.add_module("draft", make_model("gpt2", seed=3))
    edit = make_edit(model, names=["transformer.h.1.mlp.c_fc.weight"])
    edit.export_peft(tmp_path / "adapter", model)
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    touched = [name for name, _ in loaded.named_parameters() if "lora_A" in name]
    assert touched == ["base_model.model.transformer.h.1.mlp.c_fc.lora_A.default.weight"]


# -- what is refused ---------------------------------------------------------------------------------------


def test_nothing_is_overwritten(tmp_path):
    model = make_model("gpt2")
    edit, place = make_edit(model), tmp_path / "adapter"
    place.mkdir()
    edit.export_peft(place, model)  # an empty directory is free
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    with pytest.raises(FileExistsError, match="exists already.*overwrite=True"):
        make_edit(model, seed=2).export_peft(place, model)
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
    make_edit(model, seed=2).export_peft(place, model, overwrite=True)
    assert (place / "adapter_model.safetensors").read_bytes() != before["adapter_model.safetensors"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="holds other things"):
        edit.export_peft(tmp_path / "mine", model, overwrite=True)
    with pytest.raises(FileExistsError, match="is a file"):
        edit.export_peft(tmp_path / "mine" / "thesis.txt", model, overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "mine"]


def test_a_disk_that_fills_leaves_the_old(tmp_path, monkeypatch):
    model = make_model("gpt2")
    edit, place = make_edit(model), tmp_path / "adapter"
    edit.export_peft(place, model)
    before = {path.name: path.read_bytes() for path in place.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mendfast.adapters.peft.atomic_write", full)  # after the weights were written
    with pytest.raises(OSError, match="No space"):
        make_edit(model, seed=2).export_peft(place, model, overwrite=True)
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("rank, error", [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_ranks_that_are_none(rank, error, tmp_path):
    model = make_model("gpt2")
    with pytest.raises(error, match=f"rank is {rank}; it must be"):
        make_edit(model).export_peft(tmp_path / "adapter", model, rank)
    assert not list(tmp_path.iterdir())


def test_edits_that_can_not_be_exported(tmp_path):
    model = make_model("gpt2")
    with pytest.raises(ValueError, match="nothing to export"):
        Edit({}).export_peft(tmp_path / "a", model)
    edit = make_edit(model)
    next(iter(edit.factors.values())).delta[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        edit.export_peft(tmp_path / "a", model)
    with pytest.raises(ValueError, match="made for a gpt2 model"):
        make_edit(model).export_peft(tmp_path / "a", make_model("llama"))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def adapter(tmp_path):
    model = make_model("gpt2")
    make_edit(model).export_peft(tmp_path / "adapter", model)
    return tmp_path / "adapter"


def change(adapter, **values):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"peft_type": "IA3"}, "'IA3'; only LORA"),
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"rank_pattern": {"c_fc": 4}}, "rank_pattern is an object of 1 fields"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": 0}, "r is 0; it must be"),
        ({"r": 16}, "states the rank 16"),
        ({"r": "8"}, "r is '8'"),
        ({"lora_alpha": None}, "lora_alpha is None"),
    ],
)
def test_adapters_that_are_no_edits(adapter, values, message):
    change(adapter, **values)
    with pytest.raises(ValueError, match=message):
        Edit.from_peft(adapter, make_model("gpt2"))


def test_broken_files(adapter):
    model, weights, config = make_model("gpt2"), adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    tensors, whole = load_file(weights), weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        Edit.from_peft(adapter, model)
    weights.write_bytes(whole[:-4] + b"\0\0\0\1")
    with pytest.raises(ValueError, match="digest has changed"):
        Edit.from_peft(adapter, model)
    name = next(iter(tensors))
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, weights)
    with pytest.raises(ValueError, match="lacks one of the two matrices"):
        Edit.from_peft(adapter, model)
    save_file({**tensors, name: tensors[name] * float("inf")}, weights)
    with pytest.raises(ValueError, match="NaN or infinity"):
        Edit.from_peft(adapter, model)
    save_file({**tensors, "base_model.model.lm_head.weight": torch.zeros(2, 2)}, weights)
    with pytest.raises(ValueError, match="no matrix of a plain LoRA adapter"):
        Edit.from_peft(adapter, model)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors"):
        Edit.from_peft(adapter, model)
    config.write_text("{")
    weights.write_bytes(whole)
    with pytest.raises(ValueError, match="adapter_config.json"):
        Edit.from_peft(adapter, model)
    shutil.rmtree(adapter)
    with pytest.raises(FileNotFoundError, match="no adapter was saved there"):
        Edit.from_peft(adapter, model)


def test_adapters_of_other_models(adapter, tmp_path):
    with pytest.raises(ValueError, match="adapter for another model.*no layer"):
        Edit.from_peft(adapter, make_model("llama"))
    import transformers as hf

    wider = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=96, n_positions=64, n_embd=64, n_layer=4, n_head=4))
    with pytest.raises(ValueError, match="adapter for another model"):
        Edit.from_peft(adapter, wider)


def test_an_adapter_that_peft_made(tmp_path):
    model, batch = make_model("llama"), make_batch("llama")
    config = peft.LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules=["up_proj", "q_proj"], init_lora_weights=False
    )
    torch.manual_seed(0)
    tuned = peft.get_peft_model(make_model("llama"), config).eval()
    tuned.save_pretrained(tmp_path / "adapter")
    edit = Edit.from_peft(tmp_path / "adapter", model)
    assert len(edit.factors) == 8
    with edit.attached(model):
        assert torch.allclose(logits(model, batch), logits(tuned, batch), atol=1e-4, rtol=0)


# -- llama.cpp ---------------------------------------------------------------------------------------------


def read(path) -> tuple[dict, dict[str, torch.Tensor]]:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}


NAMES = {
    "llama": ["blk.1.ffn_gate", "blk.1.ffn_up", "blk.1.ffn_down"],
    "gpt2": ["blk.1.ffn_up", "blk.1.ffn_down"],
    "t5": ["enc.blk.1.ffn_up", "enc.blk.1.ffn_down", "dec.blk.1.ffn_up", "dec.blk.1.ffn_down"],
    "phi": ["blk.1.ffn_up", "blk.1.ffn_down"],
}


@pytest.mark.parametrize("arch", NAMES)
def test_llama_cpp_reads_what_the_edit_is(arch, tmp_path):
    model = make_model(arch)
    edit = make_edit(model)
    export = export_gguf_lora(edit, tmp_path / "fact.gguf", model)
    fields, tensors = read(tmp_path / "fact.gguf")
    expected = {"llama": "llama", "gpt2": "gpt2", "t5": "t5", "phi": "phi2"}[arch]
    assert fields["general.architecture"] == expected
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    scale = fields["adapter.lora.alpha"] / export.rank
    assert scale == 1 and export.rank == 3
    assert set(NAMES[arch]) <= {name.removesuffix(".weight") for name in export.names.values()}
    assert len(tensors) == 2 * len(edit.factors)
    for name, whole in dense(edit).items():
        a, b = (tensors[f"{export.names[name]}.lora_{side}"].double() for side in "ab")
        assert (scale * b @ a - whole).norm() < 3e-7 * whole.norm()


def test_the_heads_of_a_llama_are_interleaved(tmp_path):
    """llama.cpp turns neighbouring rows against each other, Hugging Face the halves of a head."""
    model = make_model("llama")
    names = [f"model.layers.1.self_attn.{side}_proj.weight" for side in "qkv"]
    edit = make_edit(model, names=names)
    export = export_gguf_lora(edit, tmp_path / "fact.gguf", model)
    _, tensors = read(tmp_path / "fact.gguf")
    width = 32 // 4
    order = [half * width // 2 + i for i in range(width // 2) for half in range(2)]
    for name, whole in dense(edit).items():
        a, b = (tensors[f"{export.names[name]}.lora_{side}"].double() for side in "ab")
        rows = [head * width + i for head in range(len(whole) // width) for i in order]
        expected = whole if "v_proj" in name else whole[rows]
        assert (b @ a - expected).norm() < 3e-7 * expected.norm(), name


def test_what_llama_cpp_has_no_adapters_for(tmp_path):
    model = make_model("opt")
    with pytest.raises(ValueError, match="no GGUF adapters for 'opt' models"):
        export_gguf_lora(make_edit(model), tmp_path / "fact.gguf", model)
    model = make_model("gpt_neox")
    name = choose_layers(model)[0].replace("mlp.dense_h_to_4h", "attention.query_key_value")
    with pytest.raises(ValueError, match="rows in another order"):
        export_gguf_lora(make_edit(model, names=[name]), tmp_path / "fact.gguf", model)
    (tmp_path / "kept.gguf").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="exists already"):
        export_gguf_lora(make_edit(model), tmp_path / "kept.gguf", model)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.gguf"]
    assert export_gguf_lora(make_edit(model), tmp_path / "kept.gguf", model, 2, overwrite=True).rank == 2
