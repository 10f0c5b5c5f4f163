"""The models whose shapes are benchmarked, with random weights: nothing is downloaded."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace

import torch
import transformers as hf

from mendfast import MendConfig, MendEditor

RANK = 1920
EDIT_TOKENS, TARGET_TOKENS, LOCALITY_TOKENS = 20, 5, 200


@dataclass(frozen=True)
class Shape:
    """A transformer's sizes; ``modes`` is the number of edited layers that share a network.

    ``kv_heads``: where they are not a quarter of the heads. ``tied``: the embeddings are the output head too.
    """

    name: str
    family: str
    width: int
    hidden: int
    blocks: int
    heads: int
    vocabulary: int
    modes: int = 3
    rank: int = RANK
    kv_heads: int = 0
    tied: bool = False
    on_cpu: bool = False

    def small(self) -> Shape:
        """The same kind of model, small enough to run every benchmark once in seconds."""
        vocabulary = self.vocabulary // 100 + 24
        return replace(self, width=48, hidden=96, blocks=4, heads=4, kv_heads=0, vocabulary=vocabulary, rank=32)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("distilGPT-2", "gpt2", 768, 3072, 6, 12, 50257, on_cpu=True),
        Shape("BART-base", "bart", 768, 3072, 6, 12, 50265, modes=4, on_cpu=True),
        Shape("BERT-base", "bert", 768, 3072, 12, 12, 30522, on_cpu=True),
        Shape(
            "SmolLM2-135M", "llama", 576, 1536, 30, 9, 49152, rank=384, kv_heads=3, tied=True, on_cpu=True
        ),
        Shape("GPT-2-XL", "gpt2", 1600, 6400, 48, 25, 50257),
        Shape("GPT-J-6B", "gptj", 4096, 16384, 28, 16, 50400),
        Shape("T5-XL", "t5", 2048, 5120, 24, 32, 32128, modes=8),
        Shape("Llama-3-8B", "llama", 4096, 14336, 32, 32, 128256, modes=6),
        Shape("Qwen2.5-7B", "qwen2", 3584, 18944, 28, 28, 152064, modes=6),
    )
}


def _config(s: Shape) -> hf.PretrainedConfig:
    gated = {
        "vocab_size": s.vocabulary, "hidden_size": s.width, "intermediate_size": s.hidden,
        "num_hidden_layers": s.blocks, "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads or max(1, s.heads // 4), "tie_word_embeddings": s.tied,
    }  # fmt: skip
    layers = {"n_embd": s.width, "n_layer": s.blocks, "n_head": s.heads, "vocab_size": s.vocabulary}
    if s.family == "gpt2":
        return hf.GPT2Config(**layers, n_inner=s.hidden)
    if s.family == "gptj":
        return hf.GPTJConfig(**layers, n_inner=s.hidden, rotary_dim=min(64, s.width // s.heads))
    if s.family == "llama":
        return hf.LlamaConfig(**gated, max_position_embeddings=8192)
    if s.family == "qwen2":
        return hf.Qwen2Config(**gated | {"num_key_value_heads": max(1, s.heads // 7)})
    if s.family == "t5":
        return hf.T5Config(
            vocab_size=s.vocabulary, d_model=s.width, d_ff=s.hidden, d_kv=s.width // s.heads, num_layers=s.blocks,
            num_decoder_layers=s.blocks, num_heads=s.heads, feed_forward_proj="gated-gelu", decoder_start_token_id=0,
        )  # fmt: skip
    if s.family == "bart":
        return hf.BartConfig(
            vocab_size=s.vocabulary, d_model=s.width, encoder_layers=s.blocks, decoder_layers=s.blocks,
            encoder_attention_heads=s.heads, decoder_attention_heads=s.heads, encoder_ffn_dim=s.hidden,
            decoder_ffn_dim=s.hidden,
        )  # fmt: skip
    return hf.BertConfig(
        vocab_size=s.vocabulary, hidden_size=s.width, intermediate_size=s.hidden, num_hidden_layers=s.blocks,
        num_attention_heads=s.heads, num_labels=2,
    )  # fmt: skip


_CLASSES = {
    "gpt2": hf.GPT2LMHeadModel,
    "gptj": hf.GPTJForCausalLM,
    "llama": hf.LlamaForCausalLM,
    "qwen2": hf.Qwen2ForCausalLM,
    "t5": hf.T5ForConditionalGeneration,
    "bart": hf.BartForConditionalGeneration,
    "bert": hf.BertForSequenceClassification,
}


_current: dict[tuple, MendEditor] = {}


def edited_model(shape: Shape, device: str, dtype: torch.dtype) -> MendEditor:
    """:func:`make_editor`, kept until another is asked for: two large models would not fit on a GPU."""
    key = (shape, device, dtype)
    if key not in _current:
        _current.clear()
        gc.collect()
        _current[key] = make_editor(*key)
    return _current[key]


def make_editor(shape: Shape, device: str, dtype: torch.dtype) -> MendEditor:
    """A random model of the shape and its editor (``editor.model``), with statistics and non-zero U."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    with torch.device(device):
        try:
            torch.set_default_dtype(dtype)
            model = _CLASSES[shape.family](_config(shape)).eval()
        finally:
            torch.set_default_dtype(default)
        editor = MendEditor.from_model(model, None, MendConfig(rank=shape.rank, scale_v=True, step_size=1e-3))
    editor.train().edit_tokens(batch(shape, 4, seed=9))
    with torch.no_grad():
        for name, parameter in editor.named_parameters():
            if name.endswith(".U"):
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return editor.eval()


def batch(shape: Shape, size: int, length: int = EDIT_TOKENS, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random examples: the last TARGET_TOKENS are the target, or the decoder's all ``length``, or a class."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape_: int) -> torch.Tensor:
        return torch.randint(3, shape.vocabulary, shape_, generator=generator)

    ids = draw(size, length)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if shape.family == "bert":
        return inputs | {"labels": torch.randint(0, 2, (size,), generator=generator)}
    if shape.family in ("t5", "bart"):
        return inputs | {"labels": draw(size, TARGET_TOKENS if length == EDIT_TOKENS else length)}
    labels = torch.full_like(ids, -100)
    labels[:, -TARGET_TOKENS:] = ids[:, -TARGET_TOKENS:]
    return inputs | {"labels": labels}
