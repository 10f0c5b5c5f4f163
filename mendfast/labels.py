"""(prompt, target) -> (input_ids, attention_mask, labels): the one place that says which tokens are learned.

Decoder-only models read prompt and target as one text. The two are tokenised together, never the target
alone: on its own it may get a BOS, lose the space before it, or split into other tokens than in place.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .schema import is_text, shown
from .types import IGNORE


def encode_pair(
    tokenizer: Any,
    prompt: str,
    target: str,
    *,
    encoder_decoder: bool = False,
    separator: str = " ",
    append_eos: bool = False,
    max_length: int | None = None,
) -> dict[str, list[int]]:
    """One example as Hugging Face models take it; labels are unshifted, -100 on what is not a target.

    Decoder-only: ``input_ids`` are those of prompt + separator + target, ``labels`` the same ids from the
    first token on in which the text with the target differs from the prompt alone, so a token that merges
    across the boundary belongs to the target. What the tokenizer puts in front by itself (BOS, CLS) stays,
    once; what it puts at the end by itself (EOS, SEP) is left out, so that ``append_eos`` alone decides
    whether the model is to learn to stop. Encoder-decoder: ``input_ids`` from the prompt and ``labels`` from
    the target, each as the tokenizer makes them (``text_target=``), its own EOS included.

    Args:
        tokenizer: a Hugging Face tokenizer; its padding and truncation settings play no part.
        separator: text between prompt and target (decoder-only). Left out where the prompt is empty or ends
            in whitespace, or the target starts with whitespace. Scripts without spaces: :func:`separated`.
        append_eos: end the target with one EOS token, a label like the others.
        max_length: the most tokens that the model takes, on either side of an encoder-decoder; None: any.

    Returns:
        "input_ids", "attention_mask" (all ones) and "labels", lists of int. The first two share a length; an
        encoder-decoder's labels have their own.

    Raises:
        TypeError: prompt, target or separator is not a str.
        ValueError: an empty or whitespace target, one that becomes no tokens, one that nothing comes before,
            one longer than ``max_length``; ``append_eos`` with a tokenizer that has no EOS.
    """
    for name, text in (("prompt", prompt), ("target", target), ("separator", separator)):
        check_text(name, text)
    if not target.strip():
        raise ValueError(f"The target is {target!r}, which says nothing; pass the answer to be learned.")
    if encoder_decoder:
        ids = list(tokenizer(prompt, padding=False, truncation=False)["input_ids"])
        if not ids:
            raise ValueError(f"The prompt {prompt!r} becomes no tokens with this tokenizer; pass another.")
        if not _target_ids(tokenizer, target, add_special_tokens=False):
            raise _no_tokens(tokenizer, target)
        labels = _target_ids(tokenizer, target)
        if append_eos:
            _end(labels, tokenizer)
        _check_length("The prompt has", ids, max_length, "Shorten the prompt.")
        _check_length("The target has", labels, max_length, "Shorten the target.")
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    if not prompt or prompt[-1].isspace() or target[0].isspace():
        separator = ""
    alone = _ids(tokenizer, prompt)
    text = prompt + separator + target
    together = _ids(tokenizer, text)
    start = next((i for i, (a, b) in enumerate(zip(alone, together, strict=False)) if a != b), len(alone))
    if start >= len(together):
        raise _no_tokens(tokenizer, target)
    front = _front(tokenizer, text, together)
    ids, start = front + together, start + len(front)
    if append_eos:
        _end(ids, tokenizer)
    if start == 0 and len(ids) == 1:
        raise ValueError(
            f"Nothing comes before the target {target!r}, a single token, so no model can predict it: pass "
            "a prompt, or a tokenizer that adds a BOS token."
        )
    advice = f"The target takes {len(ids) - start} of them; shorten one or the other."
    _check_length("Prompt and target have", ids, max_length, advice)
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORE] * start + ids[start:]}


def check_text(name: str, text: Any) -> None:
    """What a tokenizer would refuse without saying what it is."""
    if not isinstance(text, str):
        raise TypeError(f"The {name} is {shown(text)}, of type {type(text).__name__}; it must be a str.")
    if not is_text(text):
        raise ValueError(f"The {name} is {shown(text)}: it holds half a surrogate pair, which is no character.")


_NO_SPACES = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x2E80, 0x312F),  # CJK radicals and punctuation, Kana, Bopomofo
    (0x31A0, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0xFF00, 0xFFEF),  # full-width forms
    (0x20000, 0x323AF),
)
"""Code points of scripts that put no space between words; Korean does."""


def separated(text: str) -> bool:
    """Whether ``text`` ends in a script that puts spaces between words; Chinese, Japanese and Thai do not."""
    return not any(first <= ord(text[-1]) <= last for first, last in _NO_SPACES) if text else True


_MARK = "mendfast-was-here"


def has_template(tokenizer: Any) -> bool:
    return getattr(tokenizer, "chat_template", None) is not None


def chat_prompt(tokenizer: Any, prompt: str, system: str | None = None) -> str:
    """The prompt as the user's turn of the tokenizer's own chat template, up to where the answer begins."""
    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def end_of_turn(tokenizer: Any) -> str:
    """What the chat template ends the assistant's turn with: the first special token after its text.

    It need not be ``eos_token``. A ValueError if the template puts no special token there, nor is there an EOS.
    """
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
    after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(_MARK)[2]
    special = set(tokenizer.all_special_ids) | {
        i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special
    }
    for index in _ids(tokenizer, after):
        if index in special:
            return tokenizer.convert_ids_to_tokens(index)
    if tokenizer.eos_token is None:
        raise ValueError("The chat template ends an answer with no special token, and the tokenizer has no EOS.")
    return tokenizer.eos_token


def encode_prompt(tokenizer: Any, prompt: str, *, encoder_decoder: bool = False) -> list[int]:
    """The ids that a model goes on from: those that :func:`encode_pair` puts before a target.

    Decoder-only: with the BOS that the tokenizer adds, without an EOS after the prompt.
    """
    check_text("prompt", prompt)
    if encoder_decoder:
        return list(tokenizer(prompt, padding=False, truncation=False)["input_ids"])
    ids = _ids(tokenizer, prompt)
    return _front(tokenizer, prompt, ids) + ids


def collate(
    examples: Sequence[Mapping[str, Sequence[int]]],
    *,
    pad_token_id: int,
    padding_side: str = "right",
    encoder_decoder: bool | None = None,
) -> dict[str, torch.Tensor]:
    """Pad examples of :func:`encode_pair` into one batch of int64 tensors.

    Args:
        examples: at least one; all for the same kind of model.
        pad_token_id: see :func:`pad_token_id`; masked, so its value does not matter to the model.
        padding_side: "right" or "left", for the inputs. A decoder-only model's labels follow them; those of
            an encoder-decoder are always padded right, since its decoder counts positions from the left.
        encoder_decoder: which of the two the examples are for; None: seen from the examples, where labels
            that are no copy of the inputs mean an encoder-decoder.

    Returns:
        "input_ids" [B, S], "attention_mask" [B, S] (0 on padding) and "labels" [B, S], or [B, L] for an
        encoder-decoder (-100 on padding).

    Raises:
        ValueError: no examples, an unknown padding side, lengths within an example that do not agree.
    """
    if padding_side not in ("right", "left"):
        raise ValueError(f'padding_side is {padding_side!r}; it must be "right" or "left".')
    if not examples:
        raise ValueError("collate was given no examples; pass at least one.")
    if encoder_decoder is None:
        encoder_decoder = not all(_aligned(example) for example in examples)
    for i, example in enumerate(examples):
        lengths = {name: len(example[name]) for name in ("input_ids", "attention_mask", "labels")}
        tied = [length for name, length in lengths.items() if name != "labels" or not encoder_decoder]
        if len(set(tied)) > 1:
            found = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise ValueError(f"The lengths within example {i} do not agree: {found}. Use encode_pair.")
    sides = {"labels": "right"} if encoder_decoder else {}
    fills = {"input_ids": pad_token_id, "attention_mask": 0, "labels": IGNORE}
    return {
        name: _pad([example[name] for example in examples], fill, sides.get(name, padding_side))
        for name, fill in fills.items()
    }


def pad_token_id(tokenizer: Any) -> int:
    """The id to pad with: the tokenizer's own, else its EOS (GPT-2), BOS or UNK, else 0.

    Padding is masked and carries no label, so any id of the vocabulary serves; nothing is added to the
    tokenizer, and no embedding is resized.
    """
    for name in ("pad_token_id", "eos_token_id", "bos_token_id", "unk_token_id"):
        index = getattr(tokenizer, name, None)
        if index is not None:
            return int(index)
    return 0


def class_ids(config: Any) -> dict[str, int]:
    """A sequence classifier's classes by lower-case name; one logit says "true" (or 1) against "false" (0)."""
    if config.num_labels == 1:
        return {"false": 0, "0": 0, "true": 1, "1": 1}
    return {str(name).lower(): int(i) for name, i in (config.label2id or {}).items()}


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, padding=False, truncation=False)["input_ids"])


def _target_ids(tokenizer: Any, target: str, **options: Any) -> list[int]:
    return list(tokenizer(text_target=target, padding=False, truncation=False, **options)["input_ids"])


def _front(tokenizer: Any, text: str, bare: list[int]) -> list[int]:
    """The special tokens that the tokenizer puts before ``text``, whose ids without any are ``bare``."""
    whole = list(tokenizer(text, padding=False, truncation=False)["input_ids"])
    at = next((i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare), None)
    if at is None:  # a text that is split otherwise after a BOS
        special = set(tokenizer.all_special_ids)
        front = list(itertools.takewhile(special.__contains__, whole))
    else:
        front = whole[:at]
    # A prompt that is spelled with its BOS (a chat template's output) has it already.
    return front[:-1] if front and front[-1] == bare[0] else front


def _end(ids: list[int], tokenizer: Any) -> None:
    eos = getattr(tokenizer, "eos_token_id", None)
    if eos is None:
        raise ValueError("append_eos needs an EOS token; the tokenizer has none: set tokenizer.eos_token.")
    if ids[-1] != eos:
        ids.append(eos)


def _aligned(example: Mapping[str, Sequence[int]]) -> bool:
    ids, labels = example["input_ids"], example["labels"]
    return len(ids) == len(labels) and all(b in (IGNORE, a) for a, b in zip(ids, labels, strict=True))


def _pad(rows: Sequence[Sequence[int]], fill: int, side: str) -> torch.Tensor:
    padded = torch.full((len(rows), max(map(len, rows))), fill, dtype=torch.long)
    for target, row in zip(padded, rows, strict=True):
        kept = slice(len(row)) if side == "right" else slice(len(target) - len(row), None)
        target[kept] = torch.tensor(row, dtype=torch.long)
    return padded


def _check_length(what: str, ids: list[int], limit: int | None, advice: str) -> None:
    if limit is not None and len(ids) > limit:
        raise ValueError(f"{what} {len(ids)} tokens and the limit is {limit}. {advice}")


def _no_tokens(tokenizer: Any, target: str) -> ValueError:
    if not _ids(tokenizer, "The answer is 42."):
        where = shown(getattr(tokenizer, "name_or_path", ""))
        return ValueError(
            f"The tokenizer (a {type(tokenizer).__name__} from {where}) makes no tokens of any text: its files, such "
            "as tokenizer.json or vocab.json, are missing or empty. Save the tokenizer beside the model."
        )
    return ValueError(
        f"The target {target!r} becomes no tokens with this tokenizer; pass one that it can spell."
    )
