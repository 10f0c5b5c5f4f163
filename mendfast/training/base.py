"""A small base model from question and answer pairs, so that there is something to edit without a download."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from tqdm import tqdm
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from ..labels import collate, encode_pair, pad_token_id
from ..objective import model_kind, target_rows

EOS, PAD = "<eos>", "<pad>"
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


def small_gpt2(vocab_size: int, *, width: int, depth: int, heads: int, context: int = 64) -> GPT2LMHeadModel:
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
    matrix_rate: float = 0.02,
    warmup: int = 50,
    seed: int = 0,
    progress: bool = True,
) -> float:
    """Train ``model`` in place to answer each prompt with its target; returns the last loss.

    Orthogonalised momentum for the blocks' matrices, AdamW without weight decay for the rest, linear warm-up
    and decay, gradients clipped at norm 1. The loss is the mean over answer tokens.
    """
    kind = model_kind(model)
    examples = [
        encode_pair(tokenizer, p, t, encoder_decoder=kind == "encoder-decoder", append_eos=True) for p, t in pairs
    ]
    lengths = [len(example["input_ids"]) for example in examples]
    generator = torch.Generator().manual_seed(seed)
    batches = _batches(lengths, batch_size, generator)
    inner = [p for name, p in model.named_parameters() if p.dim() == 2 and _IN_BLOCK.search(name)]
    outer = [p for name, p in model.named_parameters() if not (p.dim() == 2 and _IN_BLOCK.search(name))]
    optimizers = [
        Orthogonal(inner, matrix_rate),
        torch.optim.AdamW(outer, lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.98)),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warmup, max(0.02, (steps - step) / max(1, steps - warmup)))
        )
        for optimizer in optimizers
    ]
    model.train()
    bar = tqdm(range(steps), desc="base model", unit="step", disable=not progress)
    value = math.nan
    for step in bar:
        batch = collate([examples[i] for i in next(batches)], pad_token_id=pad_token_id(tokenizer))
        rows = target_rows(model, batch)
        loss = nn.functional.cross_entropy(rows.logits.float(), rows.labels)
        model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        if step % 20 == 0 or step == steps - 1:
            value = loss.item()
            bar.set_postfix(loss=f"{value:.4f}")
    model.eval()
    return value
