"""Base models that are not plain float32 weights on one device: 16-bit, quantised, split, offloaded."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import make_batch, make_model
from test_meta import batches, gradients

from mendfast import MendConfig, MendEditor
from mendfast.base_model import small_gpt2
from mendfast.cli import main
from mendfast.training import editor_loss as meta_loss


def step(model: torch.nn.Module, name: str, **options) -> tuple[MendEditor, dict[str, torch.Tensor]]:
    """A new editor after the backward pass of one step in train mode, and its gradients."""
    torch.manual_seed(0)
    editor = MendEditor.from_model(model, None, MendConfig(rank=8, step_size=1e-2, scale_v=True)).train()
    meta_loss(editor, *batches(name), **options)[0].backward()
    return editor.eval(), gradients(editor)


def similar(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], share: float) -> None:
    for key, gradient in theirs.items():
        assert gradient.dtype == torch.float32 and ours[key].dtype == torch.float32
        assert (ours[key] - gradient).norm() <= share * gradient.norm() + 1e-6, key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_a_16_bit_base_with_a_float32_editor(name, dtype):
    editor, ours = step(make_model(name).to(dtype), name)
    assert all(p.dtype == torch.float32 for p in editor.parameters())
    _, exact = step(make_model(name), name)
    assert all(g.isfinite().all() for g in ours.values())
    norm = sum(g.norm() ** 2 for g in exact.values()).sqrt()
    gap = sum((ours[key] - exact[key]).norm() ** 2 for key in exact).sqrt()
    assert 0 < gap < 0.3 * norm
    torch.optim.Adam(editor.parameters(), 1e-3).step()
    assert all(p.isfinite().all() for p in editor.parameters())


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_base(bits):
    """Packed weights have other shapes; they are edited by what the layer says of its width."""
    quanto = pytest.importorskip("optimum.quanto", reason="needs optimum-quanto (pip install optimum-quanto)")
    quantised, plain = make_model("llama"), make_model("llama")
    quanto.quantize(quantised, weights=quanto.qint8 if bits == 8 else quanto.qint4)
    quanto.freeze(quantised)
    with torch.no_grad():  # a float model of the same numbers
        for name, module in quantised.named_modules():
            if isinstance(module, quanto.QModuleMixin):
                plain.get_submodule(name).weight.copy_(module.weight.dequantize())
    editor, ours = step(quantised, "llama")
    assert editor.config.layers == MendEditor.from_model(plain).config.layers
    _, theirs = step(plain, "llama")
    similar(ours, theirs, 1e-3)
    similar(step(quantised, "llama", checkpoint_activations=True)[1], ours, 1e-5)

    batch = make_batch("llama", 1)
    edit = editor.edit_tokens(batch)
    with torch.no_grad():
        before = quantised(**batch).logits
        with edit.attached(quantised):
            assert (quantised(**batch).logits - before).abs().max() > 1e-3
        with pytest.raises(ValueError, match=r"quantised .* can't be edited in place; attach the edit instead"):
            edit.apply_(quantised)
        assert torch.equal(quantised(**batch).logits, before)


class Packed(torch.nn.Module):
    """A layer of another library: no nn.Linear, and its weight is a method."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("packed", linear.weight.detach().flatten())

    def weight(self) -> torch.Tensor:
        return self.packed.view(self.out_features, self.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight())


def test_layers_of_other_libraries():
    model, plain = make_model("llama"), make_model("llama")
    for layer in model.model.layers:
        layer.mlp.down_proj = Packed(layer.mlp.down_proj)
    editor, ours = step(model, "llama")
    similar(ours, step(plain, "llama")[1], 1e-6)
    with pytest.raises(ValueError, match="quantised by Packed"):
        editor.edit_tokens(make_batch("llama", 1)).apply_(model)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_model_that_accelerate_has_placed(place, tmp_path):
    """Its hooks, which live in module.forward, survive; offloaded weights come and go around each layer."""
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate (pip install accelerate)")
    _, theirs = step(make_model("gpt2"), "gpt2")
    device_map = {"transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.ln_f": "cpu", "lm_head": "cpu"}
    device_map |= {f"transformer.h.{i}": place if i in (0, 3) else "cpu" for i in range(4)}
    model = accelerate.dispatch_model(
        make_model("gpt2"), device_map, main_device="cpu", offload_dir=tmp_path, force_hooks=True
    )
    assert model.transformer.h[3].mlp.c_fc.weight.is_meta == (place == "disk")
    hooked = {name for name, module in model.named_modules() if "forward" in vars(module)}
    assert hooked
    for options in ({}, {"checkpoint_activations": True}):
        editor, ours = step(model, "gpt2", **options)
        similar(ours, theirs, 1e-6)
    assert {name for name, module in model.named_modules() if "forward" in vars(module)} == hooked
    edit = editor.edit_tokens(make_batch("gpt2", 1))
    with torch.no_grad(), edit.attached(model):
        assert model(**make_batch("gpt2", 1)).logits.isfinite().all()
    if place == "disk":
        with pytest.raises(ValueError, match=r"meta device .* attach the edit instead"):
            edit.apply_(model)
    else:
        edit.apply_(model).revert_(model)


def test_a_model_without_numbers():
    with pytest.raises(ValueError, match="is on the meta device and holds no numbers; load the model's weights"):
        MendEditor.from_model(make_model("gpt2").to("meta"))


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory) -> Path:
    """A directory with a model and its tokenizer, and data beside them."""
    directory = tmp_path_factory.mktemp("saved")
    small_gpt2(len(tokenizer), width=32, depth=3, heads=4).save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    (directory / "qa.tsv").write_text("".join(f"Who is number {i}?\tPerson {i % 7}\n" for i in range(40)))
    return directory


def test_a_device_map_on_the_command_line(saved, tmp_path):
    options = ["--data", saved / "qa.tsv", "--output", tmp_path, "--model", saved / "model", "--device-map", "cpu",
               "--dtype", "bfloat16", "--rank", 8, "--dry-run", "--json", tmp_path / "plan.json"]  # fmt: skip
    assert main(["train", *map(str, options)]) == 0
    plan = json.loads((tmp_path / "plan.json").read_text())["bytes"]
    whole, parts = plan_of(saved, tmp_path, []), plan_of(saved, tmp_path, ["--accumulate", 4])
    assert plan["base"] < 0.6 * whole["base"] and parts["logits"] < 0.5 * whole["logits"]


def plan_of(saved: Path, tmp_path: Path, more: list) -> dict[str, int]:
    options = ["--data", saved / "qa.tsv", "--output", tmp_path, "--model", saved / "model", "--rank", 8, "--dry-run",
               "--json", tmp_path / "other.json", *more]  # fmt: skip
    assert main(["train", *map(str, options)]) == 0
    return json.loads((tmp_path / "other.json").read_text())["bytes"]


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed here")
def test_quantisation_without_its_library_is_a_sentence(saved, tmp_path, capsys):
    options = ["--data", saved / "qa.tsv", "--output", tmp_path, "--model", saved / "model", "--quantize", "4bit"]
    assert main(["train", *map(str, options)]) == 2
    assert "bitsandbytes" in capsys.readouterr().err
