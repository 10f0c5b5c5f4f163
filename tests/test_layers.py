"""Which layers are chosen and found: mixtures of experts, models that see, models in PEFT's wrappers."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import architectures
import pytest
import torch
import transformers as hf
from conftest import VOCAB, make_batch, make_model
from test_editor import logits, same_bits, state
from torch import nn

from mendfast import Edit, MendConfig, MendEditor, revert_all
from mendfast.choice import choose_layers, find_layers, text_stacks
from mendfast.layers import walk
from mendfast.training import editor_loss

CONFIG = MendConfig(rank=4, step_size=0.05)
SHARED = ("gate_proj", "up_proj", "down_proj")
MIXTURES = {  # -> what is edited in each of the last blocks
    "mixtral": ("MixtralForCausalLM", ("self_attn.o_proj",)),
    "qwen2_moe": ("Qwen2MoeForCausalLM", tuple(f"mlp.shared_expert.{name}" for name in SHARED)),
    "qwen3_moe": ("Qwen3MoeForCausalLM", ("self_attn.o_proj",)),
    "deepseek_v2": ("DeepseekV2ForCausalLM", tuple(f"mlp.shared_experts.{name}" for name in SHARED)),
    "deepseek_v3": ("DeepseekV3ForCausalLM", tuple(f"mlp.shared_experts.{name}" for name in SHARED)),
    "gpt_oss": ("GptOssForCausalLM", ("self_attn.o_proj",)),
    "granitemoe": ("GraniteMoeForCausalLM", ("self_attn.o_proj",)),
    "olmoe": ("OlmoeForCausalLM", ("self_attn.o_proj",)),
}


def works(model: nn.Module, kind: str = "causal") -> None:
    for name, step in architectures.steps(model, kind):
        assert step() == "yes", name


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_of_experts_is_edited_beside_its_experts(name, caplog):
    class_name, paths = MIXTURES[name]
    model = architectures.build(name, class_name, "causal")
    with caplog.at_level(logging.INFO, "mendfast"):
        names = choose_layers(model)
    assert names == [f"model.layers.{i}.{path}.weight" for i in (1, 2, 3) for path in paths]
    assert "mixtures of experts" in caplog.text
    works(model)


class Mixture(nn.Module):
    """Experts as nn.Linear, a router, a shared expert and its gate."""

    def __init__(self, shared: bool):
        super().__init__()
        self.gate = nn.Linear(32, 4, bias=False)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
        if shared:
            self.shared_expert, self.shared_expert_gate = nn.Linear(32, 32), nn.Linear(32, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, 32)
        out, choice = torch.zeros_like(flat), self.gate(flat).argmax(-1)
        for i, expert in enumerate(self.experts):
            out = out.index_add(0, (rows := (choice == i).nonzero()[:, 0]), expert(flat[rows]))
        if hasattr(self, "shared_expert"):
            out = out + self.shared_expert(flat) * self.shared_expert_gate(flat).sigmoid()
        return out.view(x.shape)


@pytest.mark.parametrize("shared", [True, False])
def test_experts_that_are_linear_layers(shared):
    """As older models and those with code of their own have them."""
    model = make_model("llama")
    for layer in model.model.layers:
        layer.mlp = Mixture(shared)
    path = "mlp.shared_expert" if shared else "self_attn.o_proj"
    assert choose_layers(model) == [f"model.layers.{i}.{path}.weight" for i in (1, 2, 3)]
    works(model)
    experts = [f"model.layers.{i}.mlp.experts.{k}.weight" for i in (2, 3) for k in range(4)]
    editor = MendEditor.from_model(model, None, MendConfig(rank=4, step_size=0.05, layers=experts))
    batch, before = make_batch("llama"), state(model)
    edit = editor.edit_tokens(batch)
    samples = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(len(batch["labels"]))]
    alone = Edit.sum([editor.edit_tokens(sample) for sample in samples])
    for name, (u, delta, alpha) in edit.factors.items():
        other = alone.factors[name]
        torch.testing.assert_close(alpha * delta.T @ u, other.alpha * other.delta.T @ other.u, rtol=1e-4, atol=1e-6)
    unedited = logits(model, batch)
    with edit.attached(model):
        attached = logits(model, batch)
    assert (attached - unedited).abs().max() > 1e-3
    edit.apply_(model)
    torch.testing.assert_close(logits(model, batch), attached, rtol=1e-4, atol=1e-4)
    edit.revert_(model)
    assert same_bits(model, before)
    one = {k: v[:1] for k, v in batch.items()}
    assert editor_loss(editor, one, one, one)[0].isfinite()
    with pytest.raises(ValueError, match="routed expert, which sees a selection.*take one at a time"):
        editor_loss(editor, batch, batch, batch)


def test_dense_blocks_at_the_bottom_are_not_the_last_ones():
    model = make_model("llama")
    for layer in list(model.model.layers)[1:]:
        layer.mlp = Mixture(False)
    assert choose_layers(model) == [f"model.layers.{i}.self_attn.o_proj.weight" for i in (1, 2, 3)]


TABLE = Path(__file__).parent.parent / "docs" / "architectures.md"


@pytest.mark.skipif(not TABLE.is_file(), reason="the documentation is not here")
def test_every_cell_of_the_table_says_something():
    text = TABLE.read_text(encoding="utf-8")
    assert architectures.faults(text) == []
    assert architectures.faults(text.replace("| yes | yes |", "| yes |  |", 1))[0].endswith("has an empty cell")
    raw = text.replace("| yes | yes |", "| yes | KeyError: 'x' |", 1)
    assert "gives a raw error: KeyError" in architectures.faults(raw)[0]


# -- models that see ---------------------------------------------------------------------------------------------------

SEEING = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "gemma3": "Gemma3ForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
}


@pytest.mark.parametrize("name", SEEING)
def test_a_model_that_sees_is_edited_where_it_reads(name):
    model = architectures.build(name, SEEING[name], "causal")
    names = choose_layers(model)
    assert len(names) == 9 and all(name.startswith("model.language_model.layers.") for name in names)
    works(model)


def llava() -> nn.Module:
    vision = hf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    text = hf.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    config = hf.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=90, image_seq_length=4,
        vision_feature_layer=-1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.15)
    return model


def test_an_image_in_the_prompt_passes_through():
    model = llava()
    batch = make_batch("llama", 2, 12)
    batch["input_ids"].clamp_(max=89)
    batch["input_ids"][:, 1:5] = 90
    torch.manual_seed(1)
    batch["pixel_values"] = torch.randn(2, 3, 16, 16)
    before, editor = state(model), MendEditor.from_model(model, None, CONFIG)
    edit = editor.edit_tokens(batch)
    blind = editor.edit_tokens({**batch, "pixel_values": torch.zeros(2, 3, 16, 16)})
    assert any(not torch.equal(edit.factors[name].u, blind.factors[name].u) for name in edit.factors)
    edit.apply_(model)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(editor.config.layers)
    applied = logits(model, batch)
    edit.revert_(model)
    assert same_bits(model, before)
    with edit.attached(model):
        torch.testing.assert_close(logits(model, batch), applied, rtol=1e-4, atol=1e-4)


def test_an_encoder_and_a_decoder_are_two_stacks_of_text():
    assert [name for name, _ in text_stacks(make_model("bart"))] == ["model.encoder.layers", "model.decoder.layers"]


# -- models that others of their kind don't foretell ------------------------------------------------------------------

ODD = {
    "falcon": "FalconForCausalLM",  # adds to its layers' outputs in place
    "camembert": "CamembertForCausalLM",  # counts positions from the padding token's id up
    "mamba": "MambaForCausalLM",  # has no MLP
    "jamba": "JambaForCausalLM",  # blocks of several kinds
}


@pytest.mark.parametrize("name", ODD)
def test_odd_models_are_edited_as_others(name):
    works(architectures.build(name, ODD[name], "causal"))


def test_an_encoder_decoder_that_does_not_shift_labels_itself():
    model = architectures.build("blenderbot", "BlenderbotForConditionalGeneration", "encoder-decoder")
    works(model, "encoder-decoder")


# -- PEFT --------------------------------------------------------------------------------------------------------------


def adapted(name: str = "llama", **options) -> tuple[nn.Module, nn.Module]:
    """A plain model, and a copy of it that a LoRA adapter, not zero, is put around."""
    peft = pytest.importorskip("peft", reason="the wrappers of PEFT are tried where it is installed")
    plain = make_model(name)
    targets = {"llama": ["down_proj", "up_proj", "q_proj"], "gpt2": ["c_fc", "c_proj"]}[name]
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **options)
    torch.manual_seed(3)
    return plain, peft.get_peft_model(copy.deepcopy(plain), config).eval()


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of Conv1D's transposed weights
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("active", [True, False])
def test_a_model_with_an_adapter_is_edited_as_without(name, active):
    plain, wrapped = adapted(name)
    batch, before = make_batch(name), state(wrapped)
    assert choose_layers(wrapped) == choose_layers(plain)
    assert [n for n, _ in walk(wrapped)] == [n for n, _ in walk(plain)]
    if not active:
        wrapped.base_model.disable_adapter_layers()
    editor = MendEditor.from_model(wrapped, None, CONFIG)
    edit = editor.edit_tokens(batch)
    other = MendEditor.from_model(plain, None, CONFIG).edit_tokens(batch)
    assert list(edit.factors) == list(other.factors)
    same = all(torch.equal(edit.factors[key].u, other.factors[key].u) for key in edit.factors)
    assert same != active  # what the adapter does is part of what is edited
    unedited = logits(wrapped, batch)
    with edit.attached(wrapped):
        attached = logits(wrapped, batch)
    assert (attached - unedited).abs().max() > 1e-4
    edit.apply_(wrapped)
    second = MendEditor.from_model(plain, None, CONFIG).edit_tokens(make_batch(name, seed=4))
    second.apply_(wrapped, strict=True)  # a plain model's edit fits too
    second.revert_(wrapped)
    torch.testing.assert_close(logits(wrapped, batch), attached, rtol=1e-4, atol=1e-4)
    edit.revert_(wrapped)
    assert same_bits(wrapped, before)


def test_names_as_peft_has_them_are_understood():
    _, wrapped = adapted()
    long = "base_model.model.model.layers.2.mlp.down_proj.base_layer.weight"
    short = "model.layers.2.mlp.down_proj.weight"
    assert [layer.name for layer in find_layers(wrapped, [long, short])] == [short, short]
    with pytest.raises(ValueError, match="no layer") as error:
        find_layers(wrapped, ["model.layers.2.mlp.down_projj.weight"])
    assert "lora" not in str(error.value) and short in str(error.value)


def test_an_adapter_taken_off_between_apply_and_revert():
    _, wrapped = adapted()
    base, batch = wrapped.get_base_model(), make_batch("llama")
    before = base.model.layers[3].mlp.down_proj.base_layer.weight.clone()
    edit = MendEditor.from_model(wrapped, None, CONFIG).edit_tokens(batch)
    edit.apply_(wrapped)
    model = wrapped.unload()
    edit.revert_(model)
    assert torch.equal(model.model.layers[3].mlp.down_proj.weight, before)


def test_an_adapter_merged_between_apply_and_revert_is_refused_and_kept():
    _, wrapped = adapted()
    edit = MendEditor.from_model(wrapped, None, CONFIG).edit_tokens(make_batch("llama"))
    edit.apply_(wrapped)
    model = wrapped.merge_and_unload()
    before = state(model)
    for takes_out in (edit.revert_, revert_all):
        with pytest.raises(ValueError, match="written by something else"):
            takes_out(model)
    assert same_bits(model, before)
    again = MendEditor.from_model(model, None, CONFIG)
    assert isinstance(again.edit_tokens(make_batch("llama")), Edit)


def test_a_cache_from_before_an_edit_is_stale():
    """As docs/models.md says: keys and values of the unedited model differ from those of the edited one."""
    model, batch = make_model("llama"), make_batch("llama", 1)
    ids = batch["input_ids"]
    with torch.no_grad():
        cache = model(ids[:, :-1], use_cache=True).past_key_values
    MendEditor.from_model(model, None, MendConfig(rank=4, step_size=1.0)).edit_tokens(batch).apply_(model)
    with torch.no_grad():
        stale = model(ids[:, -1:], past_key_values=cache).logits[:, -1]
        fresh = model(ids).logits[:, -1]
    assert (stale - fresh).abs().max() > 1e-3
