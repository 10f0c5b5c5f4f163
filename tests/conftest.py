"""Small randomly initialised models of every supported architecture, and a tokenizer, made on the spot."""

from __future__ import annotations

import os

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from mendfast.ops import few_rows

VOCAB = 96
CAUSAL = {
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=4, n_head=4)
    ),
    "gptj": lambda: hf.GPTJForCausalLM(
        hf.GPTJConfig(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=4, n_head=4, rotary_dim=4)
    ),
    "gpt_neo": lambda: hf.GPTNeoForCausalLM(
        hf.GPTNeoConfig(
            vocab_size=VOCAB, max_position_embeddings=64, hidden_size=32, num_layers=4, num_heads=4,
            attention_types=[[["global", "local"], 2]], window_size=16,
        )
    ),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(
            vocab_size=VOCAB, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=64,
        )
    ),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            vocab_size=VOCAB, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, ffn_dim=64,
            max_position_embeddings=64, word_embed_proj_dim=32,
        )
    ),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GATED)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_GATED)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_GATED)),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(head_dim=8, **_GATED)),
    "phi": lambda: hf.PhiForCausalLM(
        hf.PhiConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
            max_position_embeddings=64,
        )
    ),
}  # fmt: skip
_GATED = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
SEQ2SEQ = {
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=VOCAB, d_model=32, d_ff=64, d_kv=8, num_layers=3, num_heads=4, decoder_start_token_id=0
        )
    ),
    "t5_gated": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=VOCAB, d_model=32, d_ff=64, d_kv=8, num_layers=3, num_heads=4, decoder_start_token_id=0,
            feed_forward_proj="gated-gelu",
        )
    ),
    "bart": lambda: hf.BartForConditionalGeneration(
        hf.BartConfig(
            vocab_size=VOCAB, d_model=32, encoder_layers=3, decoder_layers=3, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
        )
    ),
}  # fmt: skip
CLASSIFIER = {
    "bert": lambda: hf.BertForSequenceClassification(_bert(3)),
    "bert_one_logit": lambda: hf.BertForSequenceClassification(_bert(1)),
}
ARCHITECTURES = {**CAUSAL, **SEQ2SEQ, **CLASSIFIER}


def _bert(labels: int) -> hf.BertConfig:
    return hf.BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, num_labels=labels,
    )  # fmt: skip


def make_model(name: str, seed: int = 0) -> torch.nn.Module:
    """A float32 model in eval mode; wider initial weights than the default, so that outputs differ."""
    torch.manual_seed(seed)
    model = ARCHITECTURES[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.15)
    return model


def make_batch(name: str, size: int = 3, length: int = 9, seed: int = 0, left: bool = False) -> dict[str, torch.Tensor]:
    """A padded batch with labels on the last tokens (decoder-only), of the decoder, or one per sample."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(3, VOCAB, shape, generator=generator)

    ids, mask = draw(size, length), torch.ones(size, length, dtype=torch.long)
    lengths = [length - i % 3 for i in range(size)]
    order = torch.arange(length)
    for i, kept in enumerate(lengths):
        padding = order < length - kept if left else order >= kept
        ids[i, padding], mask[i, padding] = 0, 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if name in CLASSIFIER:
        return {**batch, "labels": torch.randint(0, 2, (size,), generator=generator)}
    if name in SEQ2SEQ:
        labels = draw(size, 5)
        for i in range(size):
            labels[i, 5 - i % 3 :] = -100
        return {**batch, "labels": labels}
    labels = torch.full_like(ids, -100)
    for i, kept in enumerate(lengths):
        end = length if left else kept
        labels[i, end - 3 : end] = ids[i, end - 3 : end]
    return {**batch, "labels": labels}


@pytest.fixture(params=ARCHITECTURES)
def architecture(request) -> str:
    return request.param


@pytest.fixture(params=["avx2", "avx512"])
def instructions(request):
    """The CPU extension's kernels, as each processor would run them."""
    if few_rows.problem():
        if request.param != "avx2":
            pytest.skip(few_rows.problem())
        yield  # for what else the test compares
        return
    from mendfast import _cpu

    own = _cpu.instructions()
    try:
        _cpu.choose(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield
    _cpu.choose(own)


@pytest.fixture(scope="session")
def tokenizer() -> hf.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with <pad> = 0 and <eos> = 1."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator(["What is the capital of France? Paris Rome Berlin Madrid"] * 4, trainer)
    return hf.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<pad>")


def pytest_configure(config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped, with the reason, where there is none")
    threads = min(2, torch.get_num_threads())
    if "PYTEST_XDIST_WORKER" in os.environ:  # one of several: two busy OpenMP programs at once slow each other down
        threads = 1
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(config, items) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and this machine has none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
