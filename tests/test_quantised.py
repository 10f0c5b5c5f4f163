"""Base models that torchao and bitsandbytes have packed (quanto's are in test_training_bases.py): edits are made,
attached and trained over them, and not written into them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import VOCAB, make_batch
from test_training_bases import similar, step
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


def by_torchao(bits: int) -> Callable[[nn.Module], None]:
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao (pip install torchao)")
    from torchao.quantization.granularity import PerGroup

    if bits == 8:
        config = quantization.Int8WeightOnlyConfig()
    else:  # its own 4-bit kernel is not for this processor; the same numbers, unpacked
        config = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16))

    def quantise(model: nn.Module) -> None:
        for block in model.model.layers:
            quantization.quantize_(block, config)

    return quantise


def by_bitsandbytes(bits: int) -> Callable[[nn.Module], None]:
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (pip install bitsandbytes)")

    def packed(linear: nn.Linear) -> nn.Module:
        sizes, weight = (linear.in_features, linear.out_features, linear.bias is not None), linear.weight.data
        if bits == 8:
            layer = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
            layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        else:
            layer = bnb.nn.Linear4bit(*sizes, compute_dtype=torch.float32, quant_type="nf4")
            layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        layer.bias = linear.bias
        return layer.to("cpu")  # which packs it

    def quantise(model: nn.Module) -> None:
        for block in model.model.layers:
            for path, module in list(block.named_modules()):
                if isinstance(module, nn.Linear):
                    parent, _, name = path.rpartition(".")
                    setattr(block.get_submodule(parent), name, packed(module))

    return quantise


def numbers(weight: torch.Tensor) -> torch.Tensor:
    """What the packed weight stands for."""
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    if hasattr(weight, "SCB"):
        return weight.data.float() * weight.SCB[:, None] / 127
    return weight.dequantize()


def make_base() -> nn.Module:
    """A Llama whose widths are whole blocks of 4-bit numbers: on CPUs with units for bfloat16 products bitsandbytes
    takes no others."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.1)
    return model


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("quantiser", [by_torchao, by_bitsandbytes])
def test_a_packed_base(quantiser, bits, caplog):
    model, plain = make_base(), make_base()
    quantiser(bits)(model)
    with torch.no_grad():  # a float model of the same numbers
        for layer, other in zip(model.model.layers, plain.model.layers, strict=True):
            for path, module in other.named_modules():
                if isinstance(module, nn.Linear):
                    module.weight.copy_(numbers(layer.get_submodule(path).weight))
        model(**make_batch("llama"))  # bitsandbytes may pack the weights for passes without gradients now
    editor, ours = step(model, "llama")
    reference, theirs = step(plain, "llama")
    assert editor.config.layers == reference.config.layers
    # bitsandbytes' 8 bits round what the layers read, too
    exact = (quantiser, bits) != (by_bitsandbytes, 8)
    if exact:
        similar(ours, theirs, 1e-3)
    assert all(gradient.isfinite().all() for gradient in ours.values())
    batch = make_batch("llama", 1)
    edit, other = editor.edit_tokens(batch), reference.edit_tokens(batch)
    with torch.no_grad():
        before, bare = model(**batch).logits, plain(**batch).logits
        with edit.attached(model), other.attached(plain):
            moved, expected = model(**batch).logits, plain(**batch).logits
        assert (moved - before).abs().max() > 1e-3
        gap = (moved - expected).norm() / (expected - bare).norm()
        assert gap < (1e-3 if exact else 0.3)
        with pytest.raises(ValueError, match=r"quantised .* can't be edited in place; attach.*Or apply it"):
            edit.apply_(model)
        assert torch.equal(model(**batch).logits, before)
