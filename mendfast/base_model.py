"""A small base model from question and answer pairs, so that there is something to edit without a download."""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from tqdm import tqdm
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from .base_run import BaseRun
from .labels import class_ids, collate, encode_pair, pad_token_id
from .objective import Batch, context_length, model_kind, target_rows
from .stopping import Stopping

EOS, PAD = "<eos>", "<pad>"
CONTEXT = 64  # tokens, if the data has none longer
LONGEST = 512  # tokens that a small model reads, and that any is taught
_IN_BLOCK = re.compile(r"\.(h|block|layer|layers)\.\d+\.")


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with <eos> and <pad>."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=PAD)


def train_wordpiece(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer that tells capitals from small letters, with BERT's special tokens around a text."""
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    pieces = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer(lowercase=False)
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.decoder = decoders.WordPiece(prefix="##")
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=list(special.values()), show_progress=False
    )
    pieces.train_from_iterator(texts, trainer)
    ends = [(token, pieces.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    pieces.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=pieces, **special)


def small_gpt2(vocab_size: int, *, width: int, depth: int, heads: int, context: int = CONTEXT) -> GPT2LMHeadModel:
    """A randomly initialised GPT-2 of the given size, without dropout."""
    config = GPT2Config(
        vocab_size=vocab_size, n_positions=context, n_embd=width, n_layer=depth, n_head=heads,
        activation_function="gelu_pytorch_tanh", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def small_t5(vocab_size: int, *, width: int, depth: int, heads: int) -> T5ForConditionalGeneration:
    """A randomly initialised T5 of the given size, without dropout."""
    config = T5Config(
        vocab_size=vocab_size, d_model=width, d_ff=4 * width, d_kv=width // heads, num_layers=depth,
        num_decoder_layers=depth, num_heads=heads, dropout_rate=0.0, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def small_bert(
    vocab_size: int, *, width: int, depth: int, heads: int, context: int = CONTEXT
) -> BertForSequenceClassification:
    """A randomly initialised BERT of the given size with one logit, without dropout."""
    config = BertConfig(
        vocab_size=vocab_size, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth,
        num_attention_heads=heads, max_position_embeddings=context, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


SHAPES = {
    "gpt2": (small_gpt2, train_tokenizer), "t5": (small_t5, train_tokenizer), "bert": (small_bert, train_wordpiece),
}  # fmt: skip


def make_base(
    shape: str,
    pairs: Sequence[tuple[str, str]],
    *,
    vocabulary: int = 4000,
    width: int = 160,
    depth: int = 4,
    seed: int = 0,
    **options: Any,
) -> tuple[nn.Module, PreTrainedTokenizerFast]:
    """A small model, and its tokenizer, that answers each prompt with its target.

    Its context has 64 tokens, or a quarter more than the longest pair; 512 at most, and longer pairs are left out.

    Args:
        shape: one of :data:`SHAPES`; "bert" is a classifier of one logit, whose targets are "true" and "false".
        options: those of :func:`fit_base_model`.

    Raises:
        ValueError: an unknown shape, no pairs.
    """
    if shape not in SHAPES:
        raise ValueError(f"There is no shape {shape!r}; choose one of {', '.join(SHAPES)}.")
    if not pairs:
        raise ValueError("There is nothing to train a base model on; pass at least one (prompt, target).")
    make, tokens = SHAPES[shape]
    torch.manual_seed(seed)
    # A classifier's targets are no text.
    texts = [p if shape == "bert" else f"{p} {t}" for p, t in pairs]
    tokenizer = tokens(texts, vocabulary)
    size = {"width": width, "depth": depth, "heads": max(1, width // 32)}
    if shape != "t5":  # whose positions are relative
        longest = [max(map(len, tokenizer(part)["input_ids"])) for part in (texts, *zip(*pairs, strict=True))]
        # any question with any answer, as edits put them together
        size["context"] = min(LONGEST, max(CONTEXT, 5 * longest[0] // 4, sum(longest[1:]) + 8))
    model = make(len(tokenizer), **size)
    fit_base_model(model, tokenizer, pairs, seed=seed, **options)
    return model, tokenizer


def _batches(lengths: Sequence[int], size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Index batches without end: each epoch shuffled, then sorted by length within runs of 32 batches."""
    while True:
        order = torch.randperm(len(lengths), generator=generator).tolist()
        runs = [sorted(order[i : i + 32 * size], key=lengths.__getitem__) for i in range(0, len(order), 32 * size)]
        batches = [run[i : i + size] for run in runs for i in range(0, len(run), size)]
        for i in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[i]


class Orthogonal(torch.optim.Optimizer):
    """Momentum whose matrix updates are orthogonalised (Muon: Jordan et al. 2024).

    On the demo's facts 200 of its steps reach the loss of 500 of AdamW's. PyTorch's own Muon iterates in
    bfloat16, which a CPU without such units emulates: its steps took five times as long.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state, gradient = self.state[parameter], parameter.grad
                moment = state.setdefault("moment", torch.zeros_like(gradient))
                moment.lerp_(gradient, 1 - group["momentum"])
                update = _orthogonal(gradient.lerp(moment, group["momentum"]))
                rows, columns = parameter.shape
                parameter.add_(update, alpha=-group["lr"] * max(1, columns / rows) ** 0.5)


def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest matrix with singular values near 1: five Newton-Schulz steps of degree five."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def fit_base_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Sequence[tuple[str, str]],
    *,
    steps: int,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    matrix_rate: float | None = 0.02,
    warmup: int = 50,
    seed: int = 0,
    append_eos: bool = True,
    progress: bool = True,
    run: BaseRun | None = None,
) -> float:
    """Train ``model`` in place to answer each prompt with its target; returns the last loss.

    Orthogonalised momentum for the blocks' matrices, AdamW without weight decay for the rest, linear warm-up
    and decay, gradients clipped at norm 1. The loss is the mean over answer tokens, or over a classifier's
    samples. ``append_eos``: a decoder-only model learns to stop after the target. Without ``matrix_rate`` AdamW
    moves everything, at ``learning_rate``: for a pretrained model. Pairs longer than its context, or than 512 tokens
    where it has none, are left out. With a ``run`` it goes on where an interrupted one was, and Ctrl-C and SIGTERM let
    the step end and be kept before they do what they did.
    """
    examples = _encode(model, tokenizer, pairs, append_eos)
    lengths = [len(example["input_ids"]) for example in examples]
    generator = torch.Generator().manual_seed(seed)
    batches = _batches(lengths, batch_size, generator)
    inner, outer = [], []
    for name, parameter in model.named_parameters():
        in_block = matrix_rate is not None and parameter.dim() == 2 and _IN_BLOCK.search(name)
        (inner if in_block else outer).append(parameter)
    optimizers = [torch.optim.AdamW(outer, lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.98))]
    if inner:
        optimizers.append(Orthogonal(inner, matrix_rate))
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    first = 0
    if run:
        run.made_of |= {"examples": hashlib.sha256(repr(examples).encode()).hexdigest()[:16], "steps": steps}
        first = run.resume(model, optimizers)
    for _ in range(first):
        next(batches)
    model.train()
    bar = tqdm(range(first, steps), desc="base model", unit="step", initial=first, total=steps, disable=not progress)
    value = math.nan
    with Stopping() if run else contextlib.nullcontext() as stopping:
        for step in bar:
            rate = min((step + 1) / warmup, max(0.02, (steps - step) / max(1, steps - warmup)))
            batch = _collate(model, tokenizer, [examples[i] for i in next(batches)])
            rows = target_rows(model, batch)
            loss = nn.functional.cross_entropy(rows.logits.float(), rows.labels)
            model.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, whole in zip(optimizers, rates, strict=True):
                for group, most in zip(optimizer.param_groups, whole, strict=True):
                    group["lr"] = most * rate
                optimizer.step()
            if step % 20 == 0 or step == steps - 1:
                value = loss.item()
                bar.set_postfix(loss=f"{value:.4f}")
            if run:
                run.after_step(step + 1, steps, model, optimizers, stopping)
    model.eval()
    return value


def _encode(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, pairs: Sequence[tuple[str, str]], append_eos: bool
) -> list[dict[str, Any]]:
    """The pairs as examples; those that the model can't be asked are left out."""
    kind, limit = model_kind(model), context_length(model) or LONGEST
    examples: list[dict[str, Any]] = []
    refused = ""
    if kind == "classifier":
        ids, classes = tokenizer([prompt for prompt, _ in pairs])["input_ids"], class_ids(model.config)
        found = ({"input_ids": i, "labels": classes[t.lower()]} for i, (_, t) in zip(ids, pairs, strict=True))
        examples = [example for example in found if len(example["input_ids"]) <= limit]
    else:
        options = {"encoder_decoder": kind == "encoder-decoder", "append_eos": append_eos, "max_length": limit}
        for prompt, target in pairs:
            try:
                examples.append(encode_pair(tokenizer, prompt, target, **options))
            except ValueError as error:
                refused = refused or str(error)
    if not examples:
        raise ValueError(f"The base model can be taught none of {len(pairs):,} pairs. {refused}".rstrip())
    return examples


def _collate(model: nn.Module, tokenizer: PreTrainedTokenizerFast, examples: list[dict[str, Any]]) -> Batch:
    if model_kind(model) == "classifier":
        inputs = tokenizer.pad({"input_ids": [example["input_ids"] for example in examples]}, return_tensors="pt")
        return {**inputs, "labels": torch.tensor([example["labels"] for example in examples])}
    return collate(examples, pad_token_id=pad_token_id(tokenizer))
