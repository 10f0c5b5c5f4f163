"""Text that a model writes by itself: what to protect where there is no data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from .capture import frozen
from .labels import pad_token_id
from .layers import execution_device
from .objective import context_length, model_kind
from .shared_prefix import padded, read_once, shared_start

_MARK = "mendfast-was-here"


@torch.no_grad()
def own_words(
    model: nn.Module,
    tokenizer: Any,
    *,
    samples: int = 200,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    chat: bool | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    progress: bool | None = False,
) -> list[dict[str, torch.Tensor]]:
    """Token batches ("input_ids", "attention_mask", [B, S]) that the model has sampled from its own distribution.

    A model that writes plain text starts from its BOS (or EOS) token, or from drawn tokens where it has neither. A
    chat model first writes the user's turn of its template, which it has seen in training, and then its answer to it
    (after Xu et al., "Magpie", 2024). PyTorch's generators are left as they were.

    Args:
        samples: how many; max_new_tokens: of each, and of each of the two turns.
        chat: whether to go through the tokenizer's chat template; None: if it has one.
        progress: True shows a bar, None where there is a terminal.

    Raises:
        TypeError: no tokenizer. ValueError: numbers below 1, a model that does not write by itself (a classifier, an
            encoder-decoder), ``chat`` without a template.
    """
    kind = model_kind(model)
    if kind != "causal":
        raise ValueError(f"A {kind} does not write by itself; pass texts or (prompt, answer) pairs to protect.")
    if tokenizer is None:
        raise TypeError("own_words needs the model's tokenizer, for its special tokens.")
    for name, value in (("samples", samples), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if chat and not has_template:
        raise ValueError("chat is True, but the tokenizer has no chat template; set tokenizer.chat_template.")
    writer = _Writer(model, tokenizer, max_new_tokens, temperature)
    device = writer.device
    batches, chatting = [], has_template if chat is None else chat
    bar = tqdm(total=samples, desc="own words", unit="text", disable=None if progress is None else not progress)
    with frozen(model), torch.random.fork_rng([device] if device.type == "cuda" else []), bar:
        torch.manual_seed(seed)
        for start in range(0, samples, batch_size):
            size = min(batch_size, samples - start)
            batches.append(_conversations(writer, size) if chatting else writer.go_on(_starts(writer, size)))
            bar.update(size)
    return batches


class _Writer:
    """Continues token lists by sampling."""

    def __init__(self, model: nn.Module, tokenizer: Any, max_new_tokens: int, temperature: float):
        self.model, self.tokenizer, self.new, self.temperature = model, tokenizer, max_new_tokens, temperature
        self.device = execution_device(model.get_input_embeddings())
        self.pad = pad_token_id(tokenizer)
        ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ends = tokenizer.eos_token_id if ends is None else ends
        self.ends = set(ends if isinstance(ends, (list, tuple)) else [] if ends is None else [ends])

    def go_on(
        self, prompts: Sequence[list[int]], stops: Sequence[int] = (), share: float = 1.0
    ) -> dict[str, torch.Tensor]:
        """The prompts with what follows, right-padded; each up to its first end token.

        ``share``: how much of what the context has left may be used.
        """
        width = max(map(len, prompts))
        limit = context_length(self.model)
        room = self.new if limit is None else min(self.new, int(share * (limit - width)))
        shared = shared_start(self.model, prompts) if room > 0 else 0
        ids, mask = padded(prompts, self.pad, behind=shared)  # left-padded, as generate wants it
        rows = [list(prompt) for prompt in prompts]
        if room > 0:
            ends = sorted(self.ends | set(stops))
            ids, mask = ids.to(self.device), mask.to(self.device)
            cache = read_once(self.model, ids[0, :shared], [0] * len(ids)) if shared else {}
            out = self.model.generate(
                ids, attention_mask=mask, max_new_tokens=room, do_sample=True, **cache,
                temperature=self.temperature, top_k=0, top_p=1.0, repetition_penalty=1.0, pad_token_id=self.pad,
                eos_token_id=ends or None,
            )[:, width:].tolist()  # fmt: skip
            for row, new in zip(rows, out, strict=True):
                end = next((i + 1 for i, token in enumerate(new) if token in ends), len(new))
                row += new[:end]
        longest = max(map(len, rows))
        return {
            "input_ids": torch.tensor([row + [self.pad] * (longest - len(row)) for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
        }


def _starts(writer: _Writer, size: int) -> list[list[int]]:
    tokenizer = writer.tokenizer
    start = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), None)
    if start is not None:
        return [[start]] * size
    return torch.randint(writer.model.get_input_embeddings().num_embeddings, (size, 1)).tolist()


def _conversations(writer: _Writer, size: int) -> dict[str, torch.Tensor]:
    """The user's turn, sampled after what the template puts before it, and then the model's turn."""
    tokenizer = writer.tokenizer

    def template(content: str) -> str:
        turn = [{"role": "user", "content": content}]
        return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    limit = context_length(writer.model)
    bare = len(tokens(template("?")))
    if limit is not None and bare >= limit:
        raise ValueError(
            f"The chat template alone takes {bare} tokens and the model {limit}; pass chat=False, or texts to protect."
        )
    before, _, after = template(_MARK).partition(_MARK)
    front = tokens(before)
    # The turn ends where the template goes on; a model that was trained on it says so by that token.
    stops = tokens(after.lstrip())[:1]
    share = 0.5 if limit is None else 0.5 * (limit - bare) / max(1, limit - len(front))
    drafts = writer.go_on([front] * size if front else _starts(writer, size), stops, share)
    prompts = []
    for ids, kept in zip(*(part.tolist() for part in drafts.values()), strict=True):
        new = [token for token, keep in zip(ids, kept, strict=True) if keep][len(front) :]
        turn = tokenizer.decode(new, skip_special_tokens=True).strip() or "?"
        prompt = tokens(template(turn))
        while limit is not None and len(prompt) >= limit:  # what was decoded may take more tokens than it was
            turn = turn[: len(turn) // 2] or "?"
            prompt = tokens(template(turn))
        prompts.append(prompt)
    return writer.go_on(prompts)
