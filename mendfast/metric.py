"""What must stay: second moments of the edited layers' inputs over protected text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from .capture import ended_after, frozen, undone
from .choice import last_block
from .files import read_tensors, write_tensors
from .layers import Layer, execution_device, first_layer
from .moments import SecondMoment
from .objective import IGNORE, Batch, _forward, answer_positions, model_kind, to_device
from .types import Spectrum

NOTHING = (
    "There is nothing to protect: pass texts, (prompt, answer) pairs or token batches "
    "(own_words(model, tokenizer) samples some from the model itself)."
)


class Metric:
    """The second moment C = E[x x^T] of every edited layer's inputs, by the weight's name.

    M = lambda tr(C) I + mu C says how much a change of the weight would cost elsewhere; :func:`observe` gathers C.

    Args:
        moments: weight name -> :class:`SecondMoment`.
        model_type: the kind of model (``model.config.model_type``), checked on use.
        tokens: how many tokens of text it was made from.
    """

    def __init__(self, moments: Mapping[str, SecondMoment], model_type: str | None = None, tokens: int = 0):
        self.moments, self.model_type, self.tokens = dict(moments), model_type, tokens

    @classmethod
    def empty(
        cls, layers: Sequence[Layer], model_type: str | None = None, protect_rank: int | None = None
    ) -> Metric:
        """One that has seen nothing yet; ``protect_rank`` as :class:`SecondMoment`'s ``rank``."""
        moments = {
            layer.name: SecondMoment(layer.m, protect_rank, execution_device(layer.module)) for layer in layers
        }
        return cls(moments, model_type)

    def __repr__(self) -> str:
        return f"Metric({len(self.moments)} weights, {self.tokens:,} tokens)"

    def spectrum(self, name: str) -> Spectrum:
        """C of one weight's inputs, as ops.least_squares takes it."""
        return self._moment(name).spectrum()

    def dense(self, name: str) -> torch.Tensor:
        """C of one weight's inputs as a matrix; see :meth:`SecondMoment.dense`."""
        return self._moment(name).dense()

    def errors(self) -> dict[str, float]:
        """Per weight |C - C_kept| / |C|: what ``protect_rank`` leaves out; 0 without it."""
        return {name: moment.error() for name, moment in self.moments.items()}

    def to(self, device: torch.device | str) -> Metric:
        """Move to ``device``, in place."""
        for moment in self.moments.values():
            moment.to(device)
        return self

    def check(self, layers: Sequence[Layer], model_type: str | None = None) -> None:
        """A ValueError unless this is a metric of these layers that has seen some text."""
        if self.model_type and model_type and self.model_type != model_type:
            raise ValueError(f"This metric was made for a {self.model_type} model; this one is a {model_type}.")
        for layer in layers:
            moment = self._moment(layer.name)
            if moment.m != layer.m:
                raise ValueError(
                    f"This metric was made for another model: {layer.name} has {layer.m} inputs and the metric "
                    f"{moment.m}."
                )
            if not moment.count:
                raise ValueError(f"No protected text has reached {layer.name}. {NOTHING}")

    def merge(self, other: Metric, share: float | None = None) -> Metric:
        """Count in what ``other`` has seen. Checked whole before anything is changed.

        Args:
            share: of C that ``other`` makes up from now on, between 0 and 1, whatever the tokens that each has seen;
                None: by those.
        """
        if share is not None and not 0 < share < 1:
            raise ValueError(f"share is {share}; it must be between 0 and 1, or None to count every token alike.")
        if self.model_type and other.model_type and self.model_type != other.model_type:
            raise ValueError(f"Metrics of a {self.model_type} and a {other.model_type} model can't be merged.")
        mine, theirs = ({name: moment.m for name, moment in metric.moments.items()} for metric in (self, other))
        if mine != theirs:
            differing = sorted(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name))[:3]
            widths = [(name, mine.get(name, "no"), theirs.get(name, "no")) for name in differing]
            said = "; ".join(f"{name} has {one} inputs and {other}" for name, one, other in widths)
            raise ValueError(f"These metrics are of different models or layers, and can't be merged: {said}.")
        for name, moment in self.moments.items():
            seen = other.moments[name]
            weighed = share is not None and moment.count and seen.count  # an expert may have seen nothing yet
            moment.merge(seen, share / (1 - share) * moment.count / seen.count if weighed else 1)
        self.tokens += other.tokens
        self.model_type = self.model_type or other.model_type
        return self

    def disturbance(
        self,
        name: str,
        u: torch.Tensor,  # [T, m]
        delta: torch.Tensor,  # [T, n]
        alpha: float,
        weight: torch.Tensor,
        layout: str = "out_in",
    ) -> float:
        """E|S x|^2 / E|W x|^2 over the protected text, S = -alpha delta^T u: how much of a layer's output changes.

        Args:
            weight: W, [n, m], or [m, n] in the layout "in_out" (Conv1D).

        Raises:
            ValueError: a weight that the metric does not hold, or of another shape than the factors.
        """
        moment = self._moment(name)
        w = weight.detach() if layout == "out_in" else weight.detach().T
        if w.shape != (delta.shape[1], u.shape[1]) or u.shape[1] != moment.m:
            raise ValueError(
                f"{name} is {tuple(w.shape)} as (outputs, inputs), the factors {(delta.shape[1], u.shape[1])}, and the "
                f"metric has {moment.m} inputs; they belong to different models."
            )
        moved = moment.disturbance(u.detach(), delta.detach(), float(alpha))
        whole = moment.mean_square(w)
        return moved / whole if whole > 0 else float("inf") if moved > 0 else 0.0

    def _moment(self, name: str) -> SecondMoment:
        if name not in self.moments:
            raise ValueError(f"The metric holds no {name}, but {', '.join(self.moments) or 'nothing'}.")
        return self.moments[name]

    # -- on disk -------------------------------------------------------------------------------------------

    def save(self, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write a safetensors file: every weight's spectrum, and in its metadata what it was made from. Atomic.

        Args:
            dtype: of the vectors in the file: torch.float16 halves it, and keeps three digits of each.
        """
        tensors, numbers = {}, {}
        for name, moment in self.moments.items():
            parts, numbers[name] = moment.state(dtype)
            tensors |= {f"{name}:{part}": value for part, value in parts.items()}
        metadata = {
            "format": "mendfast.metric",
            "format_version": "1",
            "model_type": self.model_type or "",
            "tokens": str(self.tokens),
            "weights": json.dumps(numbers),
        }
        write_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Metric:
        """Read what :meth:`save` wrote."""
        tensors, metadata = read_tensors(path, "metric")
        try:
            moments = {}
            for name, numbers in json.loads(metadata["weights"]).items():
                parts = {part: tensors[f"{name}:{part}"] for part in Spectrum._fields}
                moments[name] = SecondMoment.from_state(parts, numbers)
            return cls(moments, metadata["model_type"] or None, int(metadata["tokens"]))
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} says that it is a mendfast metric but lacks {error}; save it again.") from error


@torch.no_grad()
def observe(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Iterable[Batch],
    *,
    protect_rank: int | None = None,
    answers: bool | str = False,
    progress: bool | None = False,
) -> Metric:
    """Stream token batches through the model, forward only, and gather the second moments of the layers' inputs.

    Positions that the (decoder's) attention mask or a label of -100 leaves out are not counted. Blocks above the
    layers are not run, and the output head computes next to nothing.

    Args:
        batches: "input_ids" and, where there is padding, "attention_mask"; of an encoder-decoder also "labels" or
            "decoder_input_ids". Labels of a causal model play no part but with ``answers``.
        answers: of a causal model only positions that predict a label, and each text's first token. All others attend
            to that one, and its inputs are of their own kind: in late blocks of SmolLM2 they are 2,400 long where the
            others are 50 (Sun et al. 2024, "Massive Activations in Large Language Models"). "first": the positions
            that predict each text's first label, and no others.
        progress: True shows a bar, None where there is a terminal.

    Raises:
        ValueError: no batches, batches that keep no token, inputs of a layer that are not finite, another ``answers``.
    """
    if answers not in (True, False, "first"):
        raise ValueError(f"answers is {answers!r}; it must be True, False or 'first'.")
    kind = model_kind(model)
    metric = Metric.empty(layers, model.config.model_type, protect_rank)
    device = execution_device(first_layer(model))
    masks: dict[str, torch.Tensor] = {}

    def hook_of(layer: Layer) -> Callable:
        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            metric.moments[layer.name].add(_kept(args[0], _mask_of(layer, args[0], masks)))

        return hook

    hidden = None if progress is None else not progress
    last = last_block(model, [layer.name for layer in layers])
    with frozen(model), undone() as changes:
        for layer in layers:
            changes.hook(layer.module, hook_of(layer))
        for batch in tqdm(batches, desc="protecting", unit="batch", disable=hidden):
            batch = to_device(batch, device)
            masks.clear()
            masks |= _masks(batch, kind)
            if answers and kind == "causal":
                predicts = answer_positions(model, batch)
                if answers == "first":
                    masks["encoder"] &= predicts & (predicts.cumsum(1) == 1)
                else:
                    masks["encoder"] &= predicts | (masks["encoder"].cumsum(1) == 1)
            batch = {name: value for name, value in batch.items() if _wanted(name, kind)}
            metric.tokens += sum(int(mask.sum()) for mask in masks.values())
            with ended_after(last):
                _run(model, batch, kind, masks)
    if not metric.tokens:
        raise ValueError(NOTHING)
    return metric


def _wanted(name: str, kind: str) -> bool:
    return name != "labels" or kind == "encoder-decoder"


def _masks(batch: Batch, kind: str) -> dict[str, torch.Tensor]:
    """Which positions count, of the encoder (or of all there is) and of the decoder: [B, S] bool."""
    if "input_ids" not in batch:
        raise ValueError(f"The batch lacks input_ids; it has {', '.join(batch)}.")
    masks = {"encoder": batch.get("attention_mask", torch.ones_like(batch["input_ids"])) != 0}
    if kind == "encoder-decoder":
        if "decoder_attention_mask" in batch:
            masks["decoder"] = batch["decoder_attention_mask"] != 0
        elif "labels" in batch:
            masks["decoder"] = batch["labels"] != IGNORE
        elif "decoder_input_ids" in batch:
            masks["decoder"] = torch.ones_like(batch["decoder_input_ids"], dtype=torch.bool)
        else:
            raise ValueError("An encoder-decoder needs labels or decoder_input_ids; pass (prompt, answer) pairs.")
    return masks


def _run(model: nn.Module, batch: Batch, kind: str, masks: Mapping[str, torch.Tensor]) -> None:
    head = torch.zeros_like(next(reversed(masks.values())))
    head[:1, :1] = True  # the logits of one position
    _forward(model, batch, kind, head)


def _mask_of(layer: Layer, x: torch.Tensor, masks: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """The mask over a layer's rows; None where it sees a selection of them (a mixture's experts)."""
    sides = ("decoder", "encoder") if "decoder" in layer.name.split(".") else ("encoder", "decoder")
    for side in sides:  # cross-attention's keys and values, in the decoder, are of the encoder's tokens
        mask = masks.get(side)
        if mask is not None and x.shape[:-1].numel() == mask.numel() and (x.dim() == 2 or x.shape[:-1] == mask.shape):
            return mask
    return None


def _kept(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    rows = x.detach().reshape(-1, x.shape[-1])
    return rows if mask is None else rows[mask.reshape(-1).to(rows.device)]
