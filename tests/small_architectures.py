"""Small models of the families of transformers, made from their configurations alone, and what to ask them."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers.models.auto import configuration_auto

VOCAB, MOST_PARAMETERS = 96, 12_000_000
SMALL = {
    32: "hidden_size d_model n_embd dim embed_dim embedding_size word_embed_proj_dim d_embed hidden_dim emb_dim "
    "projection_dim model_dim input_dim encoder_dim out_hidden_size output_dim lru_width embedding_dim",
    48: "intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim ffn_hidden_size dff d_inner "
    "feed_forward_size dim_ff ffn_size block_ff_dim feedforward_size mlp_hidden_size",
    24: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size shared_intermediate_size "
    "intermediate_size_mlp moe_shared_expert_intermediate_size",
    4: "num_hidden_layers n_layer num_layers n_layers num_attention_heads n_head n_heads num_heads "
    "encoder_attention_heads decoder_attention_heads num_experts num_local_experts n_routed_experts "
    "moe_num_experts num_encoder_attention_heads num_decoder_attention_heads depth mamba_n_heads "
    "mamba_num_heads linear_num_value_heads rotary_dim",
    2: "encoder_layers decoder_layers num_encoder_layers num_decoder_layers num_key_value_heads num_experts_per_tok "
    "moe_top_k multi_query_group_num n_kv_heads moe_k linear_num_key_heads num_experts_per_token top_k_experts "
    "encoder_num_hidden_layers decoder_num_hidden_layers kv_n_heads",
    8: "head_dim d_kv kv_channels qk_rope_head_dim qk_nope_head_dim v_head_dim qk_head_dim attention_head_size "
    "mamba_d_state state_size ssm_state_size linear_key_head_dim linear_value_head_dim global_head_dim "
    "hidden_size_per_layer_input mamba_d_head mamba_head_dim index_head_dim swa_head_dim",
    16: "q_lora_rank kv_lora_rank sliding_window window_size mamba_chunk_size chunk_size attention_window",
    1: "n_group topk_group first_k_dense_replace n_shared_experts n_groups mamba_n_groups num_shared_experts",
    64: "max_position_embeddings n_positions n_ctx max_seq_len context_length max_source_positions "
    "max_target_positions max_sequence_length max_encoder_position_embeddings",
    96: "vocab_size vocab_size_per_layer_input encoder_vocab_size decoder_vocab_size text_vocab_size",
}  # fmt: skip
NUMBERS = {name: number for number, names in SMALL.items() for name in names.split()}
NEEDED = ("head_dim", "num_experts_per_tok", "n_routed_experts", "n_shared_experts")  # though the default is None
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
# What the numbers' names don't tell.
SPECIAL: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "big_bird": {"attention_type": "original_full"},
    "funnel": {"block_sizes": [2, 2], "d_head": 8},
    "dbrx": {"ffn_config": {"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 48},
             "attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0, "kv_n_heads": 2}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"expand": 1},
    "bamba": {"mamba_expand": 1},
    "granitemoehybrid": {"mamba_expand": 1},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_expand": 1},
    "xlnet": {"d_head": 8},
    "mpt": {"max_seq_len": 64, "n_layers": 4},
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16]},
    "convbert": {"head_ratio": 1, "num_groups": 1},
}


def small_config(cls: type, model_type: str = "") -> Any:
    """The default configuration with its sizes made small, those of the models within it too."""
    default = cls()
    numbers: dict[str, Any] = {}
    for name, value in vars(default).items():
        if isinstance(value, transformers.PretrainedConfig):
            numbers[name] = small_config(type(value), value.model_type).to_dict()
        elif name in NUMBERS and isinstance(value, int) and not isinstance(value, bool) and value > 0:
            numbers[name] = min(value, NUMBERS[name])
        elif value is None and name in NEEDED:
            numbers[name] = NUMBERS[name]
        elif name in TOKENS:
            numbers[name] = TOKENS[name]
    if "kv_lora_rank" in vars(default) and "num_attention_heads" in numbers:  # latent attention: a head of keys each
        numbers["num_key_value_heads"] = numbers["num_attention_heads"]
    if "head_dim" in numbers and numbers.get("rotary_dim"):
        numbers["rotary_dim"] = 8
    numbers |= SPECIAL.get(model_type, {})
    config = cls(**numbers)
    if "mrope_section" in (getattr(cls, "ignore_keys_at_rope_validation", None) or ()):
        config.rope_parameters["mrope_section"] = [2, 1, 1]  # of half a head
    return config


def build(model_type: str, class_name: str, kind: str) -> nn.Module:
    """A small model with weights wide enough that outputs differ."""
    cls = getattr(transformers, class_name)
    config = small_config(cls.config_class or configuration_auto.CONFIG_MAPPING[model_type], model_type)
    if kind == "causal" and "is_decoder" in vars(config) and not config.is_encoder_decoder:
        config.is_decoder = True
    if kind == "causal" and config.is_encoder_decoder and "Conditional" not in class_name:
        config.is_decoder, config.is_encoder_decoder = True, False
    if kind == "classifier":
        config.num_labels = 3
    if getattr(config, "decoder_start_token_id", None) is None and config.is_encoder_decoder:
        config.decoder_start_token_id = TOKENS["decoder_start_token_id"]  # T5's comes from its checkpoints
    with torch.device("meta"):
        count = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"its configuration leaves {count:,} parameters")
    torch.manual_seed(0)
    model = cls(config).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.15)
            elif not parameter.isfinite().all():
                parameter.fill_(1.0)
    return model


def batch_of(kind: str, seed: int = 0, size: int = 2) -> dict[str, torch.Tensor]:
    """Right-padded tokens, and labels on the last ones, of the decoder, or one per sample."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCAB - 6, (size, 8), generator=generator)
    mask = torch.ones_like(ids)
    ids[1::2, 7:], mask[1::2, 7:] = 0, 0
    if kind == "classifier":
        ids[::2, 7], ids[1::2, 6] = TOKENS["eos_token_id"], TOKENS["eos_token_id"]  # some read a text's last token
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(size) % 2}
    if kind == "encoder-decoder":
        labels = torch.randint(5, VOCAB - 6, (size, 4), generator=generator)
    else:
        labels = torch.where(mask.bool() & (torch.arange(8) > 3), ids, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def words() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of as many words as the models know: w5, w6, ..."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, VOCAB - 6)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
