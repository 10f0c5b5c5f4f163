"""A model's forward pass on a tokenised batch: the logits that a loss needs, and no others."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import pad

from . import ops
from .capture import replaced_forwards, undone
from .locks import exclusive
from .ops import frozen_linear
from .ops.linear_nll import Logits, serves
from .packing import packed_batch
from .types import IGNORE, modules_of

Batch = Mapping[str, torch.Tensor]
Below = Callable[[Batch], contextlib.AbstractContextManager]
"""Within what it gives for a batch, that batch passes the model with part of the work done before."""


class Rows(NamedTuple):
    """Logits of the kept positions, stacked over the batch."""

    logits: torch.Tensor  # [K, V]
    labels: torch.Tensor | None  # [K] int64
    sample: torch.Tensor  # [K] int64: the sample that each row belongs to


def model_kind(model: nn.Module) -> str:
    """ "classifier", "encoder-decoder" or "causal"."""
    if "SequenceClassification" in type(model).__name__:
        return "classifier"
    if getattr(model.config, "is_encoder_decoder", False):
        return "encoder-decoder"
    if model.get_output_embeddings() is None:
        raise TypeError(
            f"{type(model).__name__} has no output head that mendfast can edit; use a causal language model, "
            "an encoder-decoder for generation, or a sequence classifier."
        )
    return "causal"


def text_config(model: nn.Module) -> Any:
    """The model's configuration, or its part for text where it also sees."""
    config = model.config
    if not getattr(config, "is_encoder_decoder", False) and hasattr(config, "get_text_config"):
        return config.get_text_config()
    return config


def context_length(model: nn.Module) -> int | None:
    """The longest input that the model takes, None where there is no limit (T5's relative positions)."""
    config = text_config(model)
    for name in ("max_position_embeddings", "n_positions", "n_ctx"):
        length = getattr(config, name, None)
        if isinstance(length, int) and length > 0 and config.model_type not in ("t5", "mt5", "umt5"):
            return length
    return None


def to_device(batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def target_rows(model: nn.Module, batch: Batch, *, for_nll: bool = False, learned: bool = False) -> Rows:
    """Run the model and return the rows that predict a label (!= -100), with those labels.

    ``for_nll``: the logits are wanted for :func:`nll` alone, and need not be computed if it can do without.
    ``learned``: gradients are asked for at these tokens alone; those at others may be missing.
    """
    labels = batch.get("labels")
    if labels is None:
        raise ValueError("The batch has no labels; pass them as Hugging Face does, -100 on what is not a target.")
    kind = model_kind(model)
    if kind == "classifier":
        logits = _classes(_forward(model, batch, kind, None))
        if logits.shape[0] != labels.shape[0]:
            raise ValueError(f"A classifier's labels are one per sample; these are {tuple(labels.shape)}.")
        labels = labels.reshape(-1).long().to(logits.device)
        return Rows(logits, labels, torch.arange(len(logits), device=logits.device))
    labels = _predicted(labels, kind)
    keep = labels != IGNORE
    at = keep.flatten().nonzero().squeeze(1)  # before the pass, so that a GPU isn't waited for within it
    labels, sample = labels.flatten()[at], at // keep.shape[1]
    logits = _forward(model, batch, kind, keep, for_nll, learned)
    return Rows(logits, labels.to(logits.device), sample.to(logits.device))


def labelled_rows(model: nn.Module, inputs: Batch, answers: torch.Tensor, sample: torch.Tensor) -> Rows:
    """:func:`target_rows` of one long row of tokens [1, T] of a causal model, for :func:`nll` alone: ``answers`` [T]
    are what each predicts (-100: nothing), of the samples ``sample`` [T]."""
    keep = answers != IGNORE
    device = inputs["input_ids"].device
    logits = _forward(model, inputs, "causal", keep.unsqueeze(0).to(device), True)
    return Rows(logits, answers[keep].to(logits.device), sample[keep].to(logits.device))


class Prepared(NamedTuple):
    """A batch whose pass is the same whatever it holds, as :func:`prepared` makes it for :func:`nll_of`."""

    inputs: dict[str, torch.Tensor]  # int64, on the CPU
    samples: int
    padding: int  # tokens that each text was made longer by
    tokens: int  # with them
    rows: int  # of logits


def prepared(model: nn.Module, batch: Batch, reduction: str, width: int) -> Prepared | None:
    """Everything about a batch that depends on its values, worked out on the CPU: which tokens predict, what, and of
    how many a sample's mean is; or None, where the batch holds what is not known here.

    A causal model's texts are padded to a multiple of ``width`` (1 for a model that :func:`counts_positions`), the
    predicting tokens to one of 8, so that batches of many lengths take passes of few shapes. ``reduction`` as
    ``MendConfig.loss_reduction``.
    """
    kind = model_kind(model)
    if set(batch) - {"input_ids", "attention_mask", "token_type_ids", "labels"}:
        return None
    if any(value.is_floating_point() for value in batch.values()):
        return None
    inputs = {name: value.cpu().long() for name, value in batch.items()}
    labels, (size, length) = inputs.pop("labels"), inputs["input_ids"].shape
    if any(value.shape != (size, length) for value in inputs.values()) or len(labels) != size:
        return None
    if kind == "classifier":
        if labels.numel() != size:
            return None
        counts = torch.full((size,), size if reduction == "batch" else 1)
        return Prepared({**inputs, "answers": labels.reshape(-1), "counts": counts}, size, 0, size * length, size)
    padding = 0
    if kind == "causal":
        if _padded_left(model, inputs):
            inputs["position_ids"] = _positions(inputs["attention_mask"])
        padding, limit = -length % width, context_length(model)
        padding = 0 if limit is not None and length + padding > limit else padding
        inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
        inputs = {name: pad(value, (0, padding)) for name, value in inputs.items()}
        labels = pad(_predicted(labels, kind), (0, padding), value=IGNORE)
    else:
        inputs["decoder_input_ids"] = _shifted(model, labels)
    keep = labels != IGNORE
    at = keep.flatten().nonzero().squeeze(1)
    counts = keep.sum(1)[at // keep.shape[1]] if reduction == "edit" else torch.full_like(at, len(at))
    more = -len(at) % 8
    inputs["at"], inputs["answers"] = pad(at, (0, more)), pad(labels.flatten()[at], (0, more), value=IGNORE)
    inputs["counts"] = pad(counts, (0, more), value=1)
    return Prepared(inputs, size, padding, inputs["input_ids"].numel(), len(at) + more)


def nll_of(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The sum of :func:`nll` over the samples, of the inputs that :func:`prepared` made, wherever they are now. Nothing
    here waits for a GPU."""
    inputs = dict(inputs)
    answers, counts, at = inputs.pop("answers"), inputs.pop("counts"), inputs.pop("at", None)
    if at is None:
        logits = _classes(model(**inputs).logits)
    else:
        shape = inputs.get("decoder_input_ids", inputs["input_ids"]).shape
        with _head_rows(model, at, shape) as selected:
            logits = model(**inputs, use_cache=False).logits
        logits = logits[0] if all(selected) else logits.flatten(0, 1)[at]
    return (ops.token_nll_rows(logits, answers) / counts).sum()


def _predicted(labels: torch.Tensor, kind: str) -> torch.Tensor:
    """What each position predicts: in a causal model position s the token s + 1."""
    if kind != "causal":
        return labels
    return torch.cat([labels[:, 1:], labels.new_full((labels.shape[0], 1), IGNORE)], dim=1)


def answer_positions(model: nn.Module, batch: Batch) -> torch.Tensor | None:
    """Which positions of the (decoder's) input predict a label: [B, S] bool; None for a classifier."""
    kind = model_kind(model)
    if kind == "classifier":
        return None
    if "labels" not in batch:
        raise ValueError("The batch has no labels, which say what its answers are; pass (prompt, answer) pairs.")
    return _predicted(batch["labels"], kind) != IGNORE


def kept_positions(model: nn.Module, batch: Batch) -> torch.Tensor | None:
    """Which positions the (decoder's) attention mask keeps: [B, S] bool; None for a classifier."""
    kind = model_kind(model)
    if kind == "classifier":
        return None
    if kind == "causal":
        return batch.get("attention_mask", torch.ones_like(batch["input_ids"])) != 0
    if "decoder_attention_mask" in batch:
        return batch["decoder_attention_mask"] != 0
    if "labels" in batch:
        return batch["labels"] != IGNORE
    return torch.ones_like(batch["decoder_input_ids"], dtype=torch.bool)


def kept_rows(model: nn.Module, batch: Batch, keep: torch.Tensor | None = None) -> Rows:
    """Run the model and return the rows at the positions of ``keep``, by default :func:`kept_positions`; of a
    classifier one per sample."""
    kind = model_kind(model)
    if kind == "classifier":
        logits = _classes(_forward(model, batch, kind, None))
        return Rows(logits, None, torch.arange(len(logits), device=logits.device))
    keep = kept_positions(model, batch) if keep is None else keep
    sample = keep.nonzero()[:, 0]
    logits = _forward(model, batch, kind, keep)
    return Rows(logits, None, sample.to(logits.device))


def per_sample_mean(values: torch.Tensor, sample: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Mean of each sample's rows: [K], [K] -> [B]; 0 for a sample without rows."""
    sums = values.new_zeros(batch_size).index_add(0, sample, values)
    # torch.bincount waits for a GPU to say the largest number
    counts = sample.new_zeros(batch_size).index_add(0, sample, torch.ones_like(sample)).clamp(min=1)
    return sums / counts


def nll(rows: Rows, batch_size: int) -> torch.Tensor:
    """Mean negative log-likelihood of each sample's labels: [B]."""
    return per_sample_mean(ops.token_nll_rows(rows.logits, rows.labels), rows.sample, batch_size)


def all_correct(rows: Rows, batch_size: int) -> torch.Tensor:
    """Whether each sample's labels are all the model's first choice (teacher-forced exact match): [B] bool."""
    wrong = (rows.logits.argmax(-1) != rows.labels).long()
    return wrong.new_zeros(batch_size).index_add(0, rows.sample, wrong) == 0


def _classes(logits: torch.Tensor) -> torch.Tensor:
    """One logit z stands for the two classes (0, z), so that every head is a softmax."""
    return torch.cat([torch.zeros_like(logits), logits], dim=-1) if logits.shape[-1] == 1 else logits


def _forward(
    model: nn.Module,
    batch: Batch,
    kind: str,
    keep: torch.Tensor | None,
    for_nll: bool = False,
    learned: bool = False,
) -> torch.Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if kind == "classifier":
        with packed_batch(model, _real(inputs.get("attention_mask"))):
            return model(**inputs).logits
    if kind == "encoder-decoder" and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = _shifted(model, batch["labels"])
    if kind == "causal" and "position_ids" not in inputs and _padded_left(model, inputs):
        inputs["position_ids"] = _positions(inputs["attention_mask"])
    masks = [_real(inputs.get("attention_mask"), keep if kind == "causal" else None)]
    if kind == "encoder-decoder":
        masks.append(_real(inputs.get("decoder_attention_mask"), keep, causal=True))
    only = keep if learned and kind == "causal" else None
    at = keep.flatten().nonzero().squeeze(1)
    with _head_rows(model, at, keep.shape, for_nll) as selected, packed_batch(model, *masks, learned=only):
        logits = model(**inputs, use_cache=False).logits
    if isinstance(logits, Logits):
        return logits.first()
    return logits[0] if all(selected) else logits[keep.to(logits.device)]


def _padded_left(model: nn.Module, inputs: Batch) -> bool:
    """Whether the positions must be told to a causal model: left padding must not move them, as generate() knows but
    a plain forward does not."""
    if "attention_mask" not in inputs:
        return False
    own = vars(model).get("forward")
    taken = "position_ids" in (_parameters(type(model).forward) if own is None else _parameters.__wrapped__(own))
    return taken and not bool(inputs["attention_mask"][:, 0].all()) and not counts_positions(model)


def _positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


@functools.cache
def _parameters(function: Callable) -> frozenset[str]:
    """The names of its arguments; Python works them out anew each time."""
    return frozenset(inspect.signature(function).parameters)


def _real(
    mask: torch.Tensor | None, keep: torch.Tensor | None = None, *, causal: bool = False
) -> torch.Tensor | None:
    """Which tokens matter, [B, S]: those of the mask, and those whose rows are kept; None: all of them.

    ``causal``: without a mask, all up to the last kept one.
    """
    if mask is None:
        return keep.flip(1).cummax(1).values.flip(1) if causal else None
    if mask.dim() != 2:
        return None
    if keep is not None:
        mask = mask[:, -keep.shape[1] :]  # it is of all tokens; those whose keys and values are kept don't pass again
    return mask != 0 if keep is None else (mask != 0) | keep.to(mask.device)


def _shifted(model: nn.Module, labels: torch.Tensor) -> torch.Tensor:
    """What the decoder reads where it should write ``labels``: the start token, then all of them but the last."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return model.prepare_decoder_input_ids_from_labels(labels=labels)
    start, pad = (getattr(model.config, name, None) for name in ("decoder_start_token_id", "pad_token_id"))
    if start is None or pad is None:
        raise ValueError(
            f"{type(model).__name__} makes no decoder_input_ids of labels, and its configuration says "
            f"decoder_start_token_id={start}, pad_token_id={pad}; set both in model.config, or put decoder_input_ids "
            "into the batch."
        )
    shifted = torch.cat([labels.new_full((len(labels), 1), start), labels[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == IGNORE, pad)


def counts_positions(model: nn.Module) -> bool:
    """Whether the model finds its positions itself, from padding tokens or from images, and not from 0 up."""
    own = ("get_rope_index", "create_position_ids_from_input_ids")
    return any(hasattr(module, name) for module in modules_of(model) for name in own)


@contextlib.contextmanager
def _head_rows(
    model: nn.Module, at: torch.Tensor, shape: torch.Size, for_nll: bool = False
) -> Iterator[list[bool]]:
    """Let the output head see the positions ``at`` of all the tokens [B, S] = ``shape``, in one row, and no others: a
    vocabulary of logits is the largest tensor there is.

    Yields a list that says, of each call of the head, whether it did; a head that sees more than one row for each
    token (ProphetNet's, of the tokens after the next one) does not.
    ``for_nll``: put off computing even those, where the loss can be made without; a model that does more with them
    has them computed.
    """
    head = model.get_output_embeddings()
    if head is None or head._forward_hooks:  # an edited head needs its rows as samples
        yield [False]
        return
    thread, selected = threading.get_ident(), []

    def select(module: nn.Module, args: tuple) -> tuple:
        if threading.get_ident() != thread:
            return args
        selected.append(args[0].shape[:-1] == shape)
        if not selected[-1]:
            return args
        return args[0].flatten(0, -2)[at.to(args[0].device)].unsqueeze(0), *args[1:]

    def put_off(x: torch.Tensor) -> torch.Tensor:
        mine = threading.get_ident() == thread and all(selected)
        return Logits.of(x, head) if mine else frozen_linear.forward(head, x)

    with exclusive(model), undone() as changes:
        changes.hook(head, select, before=True)
        with replaced_forwards({head: put_off} if for_nll and serves(head, len(at)) else {}):
            yield selected
