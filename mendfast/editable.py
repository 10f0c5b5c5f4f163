"""EditableModel: a model with its tokenizer and the layers that edits may change; it builds no networks."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from .capture import capture
from .choice import experts_in, find_layers
from .config import MendConfig
from .experts import parsed
from .labels import (
    chat_prompt,
    check_text,
    class_ids,
    collate,
    encode_pair,
    encode_prompt,
    end_of_turn,
    has_template,
    pad_token_id,
    separated,
)
from .layers import device_of, execution_device, first_layer, keep_differentiable, unwrapped
from .objective import IGNORE, Batch, answer_positions, context_length, model_kind, nll, target_rows, to_device
from .replay import Replays

log = logging.getLogger("mendfast")

Sides = tuple[torch.Tensor, torch.Tensor]

ENCODED_AT_MOST = 200_000
_NO_TEMPLATE = (
    "chat asks for the tokenizer's chat template and it has none: set tokenizer.chat_template, or leave chat out "
    "(MendConfig(chat=False), --no-chat)."
)


class EditableModel:
    """A Hugging Face model whose matrices can be edited: text to tokens, tokens to (u, delta).

    Everything that needs no editor network takes this; :class:`mendfast.MendEditor` is one, with networks. The model
    is never put into train mode, and none of its parameters gets a gradient.

    Args:
        model: a causal language model, an encoder-decoder, or a sequence classifier.
        tokenizer: its tokenizer; needed for text, not for token batches.
        config: which layers are edited, and how text becomes tokens; of a :class:`MendConfig` nothing else matters.

    Attributes:
        kind: "causal", "encoder-decoder" or "classifier".
        layers: the :class:`~mendfast.layers.Layer` s that edits may change.
        config: a copy of the configuration that names the layers.

    Raises:
        ValueError, TypeError: an unknown layer or one that is no matrix; a model without an output head.
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None, config: MendConfig | None = None):
        config = config or MendConfig()
        model = unwrapped(model)
        self._outside = (model, tokenizer)  # a tuple, so that an editor, an nn.Module, registers neither
        self.kind = model_kind(model)
        keep_differentiable(model)
        self.layers = find_layers(model, config.layers)
        # A copy: the caller's configuration may serve other models, whose layers have other names.
        self.config = replace(config, layers=[layer.name for layer in self.layers], chat=self._resolved(config.chat))
        if config.rows == "answers":
            self._check_answers()
        if config.layers is None:
            log.info("mendfast edits %s", ", ".join(self.config.layers))
        self._encoded: dict[tuple, dict[str, list[int]]] = {}
        self.replays = Replays()

    @property
    def model(self) -> nn.Module:
        return self._outside[0]

    @property
    def tokenizer(self) -> Any:
        return self._outside[1]

    @property
    def device(self) -> torch.device:
        return device_of(self.layers)

    # -- text to tokens ------------------------------------------------------------------------------------

    @property
    def forms(self) -> Sequence[str | None]:
        """The forms that each edit is made in; None: as the configuration says."""
        return [None] if self.config.forms is None or self.kind == "classifier" else self.config.forms

    def in_forms(self, requests: Sequence[tuple[str, ...]]) -> Sequence[tuple]:
        """Each request in all of :attr:`forms`, which follow one another; as it is where there is none to choose."""
        if self.forms == [None]:
            return requests
        return [(prompt, target, form) for prompt, target, *_ in requests for form in self.forms]

    def tokenize_edits(self, requests: Sequence[tuple[str, ...]]) -> dict[str, torch.Tensor]:
        """The batch that edits are made of: :meth:`tokenize` of :meth:`in_forms`."""
        return self.tokenize(self.in_forms(requests))

    def tokenize(self, requests: Sequence[tuple[str, ...]]) -> dict[str, torch.Tensor]:
        """The batch (input_ids, attention_mask, labels) that stands for (prompt, target) pairs, right-padded.

        A third part of a request is its form (:meth:`encode`).

        Raises:
            TypeError: no tokenizer, or something that is not text.
            ValueError: a target that says nothing, is too long, or that a classifier does not know.
        """
        if self.tokenizer is None:
            raise TypeError("This editor has no tokenizer; pass one to from_model, or use edit_tokens.")
        if self.kind == "classifier":
            prompts = [self.prompt_text(request[0], "plain") for request in requests]
            batch = dict(self.tokenizer(prompts, padding=True, padding_side="right", return_tensors="pt"))
            return {**batch, "labels": torch.tensor([self._class(request[1]) for request in requests])}
        return self._collated([self.encode(*request) for request in requests])

    def encode(self, prompt: str, target: str, form: str | None = None) -> dict[str, list[int]]:
        """One request as token ids and labels, by the template, separator and end of the configuration.

        Kept for the next time: training and evaluation ask for the same facts again and again, and on a small
        model tokenising one costs as much as editing it.

        Args:
            form: "chat": through the tokenizer's chat template; "system:TEXT": the same, with TEXT as the system's
                turn; "plain": by ``config.prompt_template``; "text": running text, of which the prompt is the beginning
                and the target the rest, which nothing ends; None: as the configuration says.
        """
        config = self.config
        key = (prompt, target, form, config.prompt_template, config.separator, config.append_eos, config.chat)
        if (found := self._encoded.get(key)) is None:
            chat = self._is_chat(form)
            if config.chat and form != "text" and target.strip():
                target += self.end
            text = self.prompt_text(prompt, form)
            found = encode_pair(
                self.tokenizer,
                text,
                target,
                encoder_decoder=self.kind == "encoder-decoder",
                separator="" if chat or form == "text" or not separated(text) else config.separator,
                append_eos=config.append_eos and not config.chat and form != "text",
                max_length=context_length(self.model),
            )
            if len(self._encoded) >= ENCODED_AT_MOST:
                self._encoded.clear()
            self._encoded[key] = found
        return found

    @property
    def chat(self) -> bool:
        """Whether prompts go through the tokenizer's chat template."""
        return bool(self.config.chat)

    @cached_property
    def end(self) -> str:
        """The token that ends an answer: the chat template's end of turn."""
        return end_of_turn(self.tokenizer)

    def prompt_text(self, prompt: str, form: str | None = None) -> str:
        """What the model reads before its answer; ``form`` as in :meth:`encode`."""
        check_text("prompt", prompt)
        if form == "text":
            return prompt
        if not self._is_chat(form):
            return self.config.prompt_template.replace("{prompt}", prompt)
        return chat_prompt(self.tokenizer, prompt, form.partition(":")[2] if form not in (None, "chat") else None)

    def _is_chat(self, form: str | None) -> bool:
        if form not in (None, "plain", "text", "chat") and not form.startswith("system:"):
            raise ValueError(f'form is {form!r}; use "plain", "chat", "system:TEXT", "text" or None.')
        chat = self.chat if form is None else form not in ("plain", "text")
        if chat and not has_template(self.tokenizer):
            raise ValueError(_NO_TEMPLATE)
        return chat

    def _check_answers(self) -> None:
        if self.kind == "classifier":
            raise ValueError("rows='answers' needs a model that writes its answers; of a classifier use rows='all'.")
        encoders = [id(p) for p in self.model.get_encoder().parameters()] if self.kind == "encoder-decoder" else []
        if read := [layer.name for layer in self.layers if id(layer.weight) in encoders]:
            raise ValueError(f"rows='answers' can't edit {read[0]}, which only reads the prompt; use rows='all'.")
        if routed := [layer.name for layer in self.layers if experts_in(layer.name) or parsed(layer.name)]:
            raise ValueError(f"rows='answers' can't edit {routed[0]}, which sees some of the tokens; use rows='all'.")

    def _resolved(self, chat: str | bool) -> bool:
        if chat == "auto":
            return self.kind == "causal" and has_template(self.tokenizer)
        if chat and self.tokenizer is not None and not has_template(self.tokenizer):
            raise ValueError(_NO_TEMPLATE)
        return chat

    def text_batches(
        self, texts: Sequence[str | tuple[str, str] | Batch], batch_size: int = 16
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Token batches of texts, of (prompt, answer) pairs, or of what are token batches already.

        Texts are cut where the model's context ends.
        """
        if isinstance(texts, (str, Mapping)):
            raise TypeError(f"texts is a {type(texts).__name__}; pass a list of texts, of pairs or of token batches.")
        examples: list[dict[str, list[int]]] = []
        for text in texts:
            if isinstance(text, Mapping):
                yield dict(text)
                continue
            examples.append(self._plain(text) if isinstance(text, str) else self.encode(*text))
            if len(examples) == batch_size:
                yield self._collated(examples)
                examples = []
        if examples:
            yield self._collated(examples)

    def _plain(self, text: str) -> dict[str, list[int]]:
        if self.kind == "encoder-decoder":
            raise ValueError("An encoder-decoder reads and writes; pass (prompt, answer) pairs and not plain texts.")
        ids = encode_prompt(self.tokenizer, text)[: context_length(self.model)]
        if not ids:
            raise ValueError(f"The text {text[:40]!r} becomes no tokens; leave it out.")
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids}

    def _collated(self, examples: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        return collate(
            examples,
            pad_token_id=pad_token_id(self.tokenizer),
            encoder_decoder=self.kind == "encoder-decoder",
        )

    def _class(self, target: str) -> int:
        names = class_ids(self.model.config)
        try:
            return names[str(target).strip().lower()]
        except KeyError:
            raise ValueError(f"The classifier has no label {target!r}; it has {', '.join(names)}.") from None

    # -- tokens to (u, delta) ------------------------------------------------------------------------------

    def gradients(self, batch: Batch) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """u [B, S, m] and delta [B, S, n] of every layer, for the loss that ``config.loss_reduction`` names.

        One forward and one backward pass; no gradient below the first edited layer, none of a parameter.

        Raises:
            ValueError: labels that are all -100 or of the wrong shape, inputs longer than the context.
        """
        self.check(batch)
        found = self.replays.gradients(self.model, self.layers, batch, self.config.loss_reduction, self._launched)
        found = self._launched(batch) if found is None else found
        return found if self.config.rows == "all" else self._answers_in(found, batch)

    def _launched(self, batch: Batch) -> dict[str, Sides]:
        """:meth:`gradients` at all tokens, each kernel launched by itself."""
        # made within torch.inference_mode, they couldn't be kept for the backward pass
        batch = {name: value.clone() if value.is_inference() else value for name, value in batch.items()}
        batch = to_device(batch, execution_device(first_layer(self.model)))
        size = batch["labels"].shape[0]
        if size > 1 and self.config.loss_reduction == "edit" and any(experts_in(layer.name) for layer in self.layers):
            samples = [{k: v[i : i + 1] if len(v) == size else v for k, v in batch.items()} for i in range(size)]
            return _stacked([self._launched(sample) for sample in samples])
        with capture(self.model, self.layers, size) as captured:
            rows = target_rows(self.model, batch, for_nll=True, learned=self.config.rows == "answers")
            if self.config.loss_reduction == "batch":
                rows, size = rows._replace(sample=torch.zeros_like(rows.sample)), 1
            # Samples do not interact, so the gradient of the sum is each edit's own gradient.
            return captured.rows(nll(rows, size).sum())

    def _answers_in(self, found: Mapping[str, Sides], batch: Batch) -> dict[str, Sides]:
        """The rows of tokens that predict a label, zeros for the others."""
        keep = answer_positions(self.model, batch)
        result = {}
        for name, (u, delta) in found.items():
            if u.shape[:2] != keep.shape:
                raise ValueError(
                    f"rows='answers' needs to know each row's token, and {name} has {u.shape[1]} rows for the "
                    f"{keep.shape[1]} tokens of a sample: it is called several times, or by some of the tokens. Use "
                    "rows='all', or name other layers."
                )
            result[name] = (u, delta * keep.unsqueeze(-1).to(delta.device))
        return result

    def check(self, batch: Batch) -> None:
        """A ValueError that says why the model can't learn from ``batch``, where it can't."""
        missing = [name for name in ("input_ids", "labels") if name not in batch]
        if missing:
            raise ValueError(f"The batch lacks {', '.join(missing)}; it has {', '.join(batch)}.")
        labels = batch["labels"].cpu()  # a GPU is waited for once
        if self.kind != "classifier":
            if labels.dim() != 2:
                raise ValueError(f"labels have the shape {tuple(labels.shape)}; they must be [batch, tokens].")
            # A causal model predicts every token but the first.
            targets = labels[:, 1:] if self.kind == "causal" else labels
            empty = (targets == IGNORE).all(-1).nonzero().flatten().tolist()
            if empty:
                raise ValueError(
                    f"The labels of sample {', '.join(map(str, empty))} are all -100: there is nothing to learn. "
                    "Set the target tokens' labels to their ids."
                )
        limit, length = context_length(self.model), batch["input_ids"].shape[-1]
        if limit is not None and length > limit:
            raise ValueError(f"The input has {length} tokens and the model takes {limit}; shorten the prompt.")


def _stacked(samples: Sequence[Mapping[str, tuple[torch.Tensor, torch.Tensor]]]) -> dict:
    """Rows of samples one by one, [1, S, k], as those of a batch, filled up by zeros."""
    result = {}
    for name in samples[0]:
        longest = max(rows[name][0].shape[1] for rows in samples)
        sides = zip(*(rows[name] for rows in samples), strict=True)
        result[name] = tuple(
            torch.cat([pad(one, (0, 0, 0, longest - one.shape[1])) for one in side]) for side in sides
        )
    return result
