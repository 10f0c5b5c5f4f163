"""The matrices of routed experts that are stacked in one parameter, edited expert by expert."""

from __future__ import annotations

import copy

import architectures
import pytest
import torch
from test_editor import logits, same_bits, state
from torch import nn

from mendfast import Edit, EditMemory, MendConfig, MendEditor, revert_all
from mendfast.training import editor_loss

STACKED = {  # what is peculiar
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",  # a shared expert, a dense block
    "gpt_oss": "GptOssForCausalLM",  # transposed, interleaved gates, biases
    "granitemoe": "GraniteMoeForCausalLM",
}
BLOCK = "model.layers.2."


def experts_of(model: nn.Module) -> tuple[str, nn.Module]:
    inside = ((name, module) for name, module in model.named_modules() if name.startswith(BLOCK))
    return next((name, m) for name, m in inside if m._parameters.get("down_proj") is not None)


def make(name: str, **options) -> tuple[nn.Module, MendEditor, dict[str, torch.Tensor]]:
    model = architectures.build(name, STACKED[name], "causal")
    path, _ = experts_of(model)
    layers = [f"{path}.gate_up_proj", f"{path}.down_proj"]
    config = MendConfig(rank=4, step_size=0.05, layers=layers, **options)
    return model, MendEditor.from_model(model, architectures.words(), config), architectures.batch_of("causal")


@pytest.mark.parametrize("name", STACKED)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_each_expert_is_edited_by_the_rows_that_it_sees(name, implementation):
    model, editor, batch = make(name)
    model.set_experts_implementation(implementation)
    path, host = experts_of(model)
    assert len(editor.config.layers) == 2 * host.num_experts
    before, plain = state(model), logits(model, batch)
    edit = editor.edit_tokens(batch)
    assert same_bits(model, before) and "forward" not in vars(host)
    rows = {name: len(u) for name, (u, _, _) in edit.factors.items()}
    ups, downs = ([rows[f"{path}.{n}[{i}]"] for i in range(host.num_experts)] for n in ("gate_up_proj", "down_proj"))
    assert ups == downs and sum(count > 0 for count in ups) > 1
    with edit.attached(model):
        attached = logits(model, batch)
        generated = logits(model, {**batch, "input_ids": batch["input_ids"].flip(0)})
    assert "forward" not in vars(host) and torch.equal(logits(model, batch), plain)
    assert (attached - plain).abs().max() > 1e-3
    edit.apply_(model)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"{path}.gate_up_proj", f"{path}.down_proj"}  # no router, no bias
    torch.testing.assert_close(logits(model, batch), attached, rtol=1e-4, atol=1e-4)
    assert generated.isfinite().all()
    edit.revert_(model)
    assert same_bits(model, before)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_the_rows_are_those_of_the_gradient(name):
    """sum_i delta_i u_i^T of an expert's rows is what autograd says of its matrix, sample by sample too."""
    model, editor, batch = make(name)
    model.set_experts_implementation("eager")
    path, host = experts_of(model)
    captured = editor.gradients(batch)
    for sample in range(2):
        one = {key: value[sample : sample + 1] for key, value in batch.items()}
        model.zero_grad()
        model(**one).loss.backward()
        for parameter in ("gate_up_proj", "down_proj"):
            gradient = getattr(host, parameter).grad
            for i in range(host.num_experts):
                u, delta = (side[sample] for side in captured[f"{path}.{parameter}[{i}]"])
                ours = u.T @ delta if host.is_transposed else delta.T @ u
                torch.testing.assert_close(ours, gradient[i], rtol=1e-4, atol=1e-5 * float(gradient.abs().max()) + 1e-7)


def test_training_summing_files_and_memories(tmp_path):
    model, editor, batch = make("mixtral", aggregation="least_squares")
    path, _ = experts_of(model)
    before, other = state(model), architectures.batch_of("causal", 1)
    editor.protect([{k: v for k, v in batch.items() if k != "labels"}])
    editor.edit_tokens(batch)  # some statistics
    gradients = []
    for checkpointed in (False, True):
        editor.zero_grad()
        loc = architectures.batch_of("causal", 2)
        editor_loss(editor, batch, other, loc, checkpoint_activations=checkpointed)[0].backward()
        gradients.append([p.grad.clone() for p in editor.parameters() if p.grad is not None])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    assert all(g.isfinite().all() for g in gradients[0]) and any(g.any() for g in gradients[0])
    edit = Edit.sum([editor.edit_tokens(batch), editor.edit_tokens(other)])
    edit.save(tmp_path / "edit.safetensors")
    again = Edit.load(tmp_path / "edit.safetensors")
    assert list(again.factors) == list(edit.factors) and f"{path}.down_proj[3]" in again.factors
    again.apply_(model, strict=True)
    with pytest.raises(ValueError, match="same factors is applied"):
        edit.apply_(model)
    twin = copy.deepcopy(model)
    revert_all(twin)
    edit.revert_(model)
    assert same_bits(model, before) and same_bits(twin, before)
    with pytest.raises(ValueError, match="stack of experts, for which adapter files have no common name"):
        edit.export_peft(tmp_path / "adapter", model)
    memory = EditMemory(editor)
    memory.add([("w10 w11 w12", "w40"), ("w20 w21", "w41")])
    with memory.attached():
        attached = logits(model, batch)
    memory.apply_()
    torch.testing.assert_close(logits(model, batch), attached, rtol=1e-4, atol=1e-4)
    memory.revert_()
    assert same_bits(model, before)
    editor.save_pretrained(tmp_path / "editor")
    loaded = MendEditor.from_pretrained(tmp_path / "editor", model, editor.tokenizer, strict=True)
    assert loaded.config.layers == editor.config.layers


def test_samples_are_kept_apart():
    model, editor, batch = make("qwen3_moe")
    together = editor.edit_tokens(batch)
    parts = [editor.edit_tokens({k: v[i : i + 1] for k, v in batch.items()}) for i in range(2)]
    apart = Edit.sum(parts)
    for name, (u, delta, alpha) in together.factors.items():
        other = apart.factors[name]
        torch.testing.assert_close(
            alpha * delta.T @ u, other.alpha * other.delta.T @ other.u, rtol=1e-4, atol=1e-6
        )


def test_a_copy_made_while_attached_is_without_the_edit():
    model, editor, batch = make("mixtral")
    plain, edit = logits(model, batch), editor.edit_tokens(batch)
    with edit.attached(model), edit.attached(model):
        twin = copy.deepcopy(model)
        assert (logits(model, batch) - plain).abs().max() > 1e-3
        assert torch.equal(logits(twin, batch), plain)
    assert torch.equal(logits(model, batch), plain)


def test_what_cannot_be_edited_says_why():
    model, editor, batch = make("mixtral")
    path, host = experts_of(model)
    for name, said in {
        f"{path}.down_proj[9]": r"an expert that there isn't; the last one is down_proj\[3\]",
        f"{path}.act_fn[0]": "holds no stacked matrices 'act_fn'",
        f"{BLOCK}self_attn.q_proj[0]": "names no expert",
        "model.layers.99.mlp.experts.down_proj[0]": "no layer",
    }.items():
        with pytest.raises(ValueError, match=said):
            MendEditor.from_model(model, None, MendConfig(layers=[name]))
    with pytest.raises(ValueError, match=r"holds 4 experts; name one of them"):
        Edit({f"{path}.down_proj": next(iter(editor.edit_tokens(batch).factors.values()))}).attached(model).__enter__()
    tokens = model(**batch, output_router_logits=True).router_logits[2][:4].topk(2).indices  # of sample 0's first
    never = set(range(4)) - set(tokens[:1].flatten().tolist())
    one = {"input_ids": batch["input_ids"][:1, :2], "labels": torch.tensor([[-100, 7]])}
    few = MendEditor.from_model(model, None, MendConfig(rank=4, layers=[f"{path}.down_proj[{i}]" for i in never]))
    with pytest.raises(ValueError, match=r"Sample 0 is routed past every expert that is edited"):
        few.edit_tokens(one)
    host._is_expert_parallel = True
    with pytest.raises(ValueError, match="its experts are spread over devices"):
        MendEditor.from_model(model, None, MendConfig(layers=[f"{path}.down_proj[0]"]))


def test_experts_that_are_called_in_a_way_of_their_own():
    model = architectures.build("llama4_text", "Llama4ForCausalLM", "causal")
    stack = next(n for n, p in model.named_parameters() if n.endswith("experts.down_proj"))
    with pytest.raises(ValueError, match="can't be edited by itself: .* does not say how it calls its experts"):
        MendEditor.from_model(model, None, MendConfig(layers=[f"{stack}[0]"]))


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_experts_that_accelerate_has_placed(place, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate (pip install accelerate)")
    plain, editor, batch = make("mixtral")
    expected = editor.edit_tokens(batch)
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.layers.{i}": place if i == 2 else "cpu" for i in range(4)}
    model = accelerate.dispatch_model(
        copy.deepcopy(plain), device_map, main_device="cpu", offload_dir=tmp_path, force_hooks=True
    )
    path, host = experts_of(model)
    assert "_old_forward" in vars(host) and host.down_proj.is_meta == (place == "disk")
    forwards = vars(host)["forward"], vars(host)["_old_forward"]
    edit = MendEditor.from_model(model, None, editor.config).edit_tokens(batch)
    for name, (u, delta, _) in expected.factors.items():
        torch.testing.assert_close(edit.factors[name].u, u)
        torch.testing.assert_close(edit.factors[name].delta, delta)
    with edit.attached(model), expected.attached(plain):
        torch.testing.assert_close(logits(model, batch), logits(plain, batch))
    assert (vars(host)["forward"], vars(host)["_old_forward"]) == forwards


def test_systems_that_train_parameters_refuse_a_part_of_one():
    from mendfast.baselines import SYSTEMS

    model, editor, _ = make("mixtral")
    for key in ("ft", "ft_kl", "enn", "ke"):
        with pytest.raises(ValueError, match=r"trains parameters, and model.*\[0\] is a part of one"):
            SYSTEMS[key].make(model, editor.tokenizer, editor.config)
