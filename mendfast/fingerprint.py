"""A fingerprint of a base model: a few numbers of some of its weights, to tell it from another of the same shape.

An editor or an edit of a base model does harm to the instruction-tuned one, or to a fine-tuned copy, and no shape says
so. The fingerprint holds a sample of each edited matrix, of the input embeddings and of a few other matrices. Two
samples agree if they differ by no more than 16-bit rounding may. Fine-tuning moves all weights by about the same
amount, so that small ones leave those bounds soon: a change of 1/1000 of a matrix is seen in every tenth element.
"""

from __future__ import annotations

import base64
import functools
import json
import logging
import weakref
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

import torch
from torch import nn

from .experts import parsed
from .layers import Layer, first_layer, inner, is_matrix, unwrapped, walk
from .ledger import backups_of
from .schema import brief, shown
from .updates import arrived

log = logging.getLogger("mendfast")

SAMPLES = 32  # numbers of each matrix
OTHERS = 6  # matrices besides the edited ones and the embeddings
RELATIVE, ABSOLUTE = 2.0**-7, 2.0**-22  # two roundings to bfloat16; to a float16 that is near 0
MOST_STRANGE = 0.005  # of all numbers; one at least is forgiven
MOST_WEIGHTS = 4096


class Sample(NamedTuple):
    """Some numbers of one weight, at places that follow from its shape."""

    shape: tuple[int, int]
    values: torch.Tensor  # [SAMPLES] bfloat16


class Fingerprint:
    """What tells a base model from others of the same shape; :func:`fingerprint_of` takes it.

    Args:
        samples: weight name -> :class:`Sample`.
        name: what the model is called (the last part of ``config.name_or_path``), for people to read.
        model_type: ``config.model_type``.
    """

    def __init__(self, samples: Mapping[str, Sample], name: str = "", model_type: str = ""):
        self.samples, self.name, self.model_type = dict(samples), name, model_type

    def __repr__(self) -> str:
        return f"Fingerprint({self.title}, {len(self.samples)} weights)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fingerprint) and self.to_json() == other.to_json()

    __hash__ = object.__hash__

    @property
    def title(self) -> str:
        return f"{self.name or 'an unnamed model'} ({self.model_type or 'of unknown type'})"

    def distance(self, model: nn.Module) -> float:
        """How far ``model`` is from the model that this was taken of: 0 if no more than 16-bit rounding lies between,
        else |a - b| / |b| over the sampled numbers.

        Edits that mendfast has written into the model's weights are left out of account. Weights that one of the two
        lacks, or holds quantised, are not compared.
        """
        ours = _sampled(model, {name: sample.shape for name, sample in self.samples.items()})
        common = [name for name in self.samples if name in ours]
        if not common:
            return 0.0
        a = torch.cat([ours[name].values for name in common]).double()
        b = torch.cat([self.samples[name].values for name in common]).double()
        gap, bound = (a - b).abs(), RELATIVE * torch.maximum(a.abs(), b.abs()) + ABSOLUTE
        strange = int((~(gap <= bound)).sum())  # NaN is strange
        if strange <= max(1, MOST_STRANGE * len(b)):
            return 0.0
        return float((a - b).norm() / b.norm().clamp(min=1e-30))

    def matches(self, model: nn.Module) -> bool:
        """Whether ``model`` has all the sampled weights, with what they held to 16-bit rounding."""
        ours = _sampled(model, {name: sample.shape for name, sample in self.samples.items()})
        return len(ours) == len(self.samples) and not self.distance(model)

    def check(self, model: nn.Module, what: str, *, strict: bool = False) -> None:
        """Warn, once for each model, that ``what`` ("This edit", say) was made for another one.

        Looks again only when PyTorch says that a sampled weight was written to.

        Raises:
            ValueError: with ``strict``, instead of the warning.
        """
        model = unwrapped(model)
        seen = _checked.setdefault(model, weakref.WeakKeyDictionary())
        versions = _versions(model, self.samples)
        known, distance, said_so = seen.get(self, (None, 0.0, False))
        if known != versions:
            distance = self.distance(model)
            seen[self] = (versions, distance, said_so)
        if not distance:
            return
        said = (
            f"{what} was made for {self.title}, and this model, {_title(model)}, holds other weights of the same shape "
            f"(they differ by {distance:.2g} of their size): what it does here was never learned. Load the model that "
            "it was made for, or train anew."
        )
        if strict:
            raise ValueError(f"{said} (strict=False warns instead.)")
        if not said_so:
            seen[self] = (versions, distance, True)
            log.warning("%s", said)

    def merged(self, other: Fingerprint | None) -> Fingerprint:
        """Both models' samples in one, for an edit that sums edits; a warning where they are of different models."""
        if other is None or other is self:
            return self
        common = [name for name in self.samples if name in other.samples]
        if any(not torch.equal(self.samples[name].values, other.samples[name].values) for name in common):
            log.warning("These edits were made for different weights: %s and %s.", self.title, other.title)
            return self
        return Fingerprint({**other.samples, **self.samples}, self.name, self.model_type)

    # -- as text, in files ---------------------------------------------------------------------------------

    def to_json(self) -> str:
        """One line; the same fingerprint gives the same text."""
        weights = {
            name: [*sample.shape, base64.b64encode(sample.values.view(torch.int16).numpy().tobytes()).decode()]
            for name, sample in sorted(self.samples.items())
        }
        content = {"name": self.name, "model_type": self.model_type, "weights": weights}
        return json.dumps(content, separators=(",", ":"), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | None, where: str) -> Fingerprint | None:
        """What :meth:`to_json` wrote; None for None, as files of earlier versions have it.

        Raises:
            ValueError: it is something else; ``where`` names the file.
        """
        if text is None:
            return None
        try:
            content = json.loads(text)
            name, model_type, weights = content["name"], content["model_type"], content["weights"]
            if not isinstance(name, str) or not isinstance(model_type, str) or len(weights) > MOST_WEIGHTS:
                raise ValueError
            samples = {}
            for key, (rows, columns, packed) in weights.items():
                values = torch.frombuffer(bytearray(base64.b64decode(packed, validate=True)), dtype=torch.int16)
                if len(values) != SAMPLES or not all(isinstance(k, int) and 0 < k < 2**31 for k in (rows, columns)):
                    raise ValueError
                samples[key] = Sample((rows, columns), values.view(torch.bfloat16))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{where}: the fingerprint of its base model is {shown(text)}; save it again.") from error
        return cls(samples, brief(name, 80), brief(model_type, 80))


def fingerprint_of(model: nn.Module, layers: Sequence[Layer] | Sequence[str]) -> Fingerprint:
    """The fingerprint of ``model`` as it was before any edit, for edits of ``layers``.

    Some hundred numbers are read, once for each state of the weights. Quantised, sharded and offloaded weights are
    left out.
    """
    model = unwrapped(model)
    names = tuple(layer if isinstance(layer, str) else layer.name for layer in layers)
    kept = _taken.setdefault(model, {})
    wanted, found, versions = kept.get(names, (None, None, None))
    if wanted is None:
        wanted = _chosen(model, names)
    if versions != (now := _versions(model, wanted)):
        config = getattr(model, "config", None)
        samples = _sampled(model, dict.fromkeys(wanted))
        found = Fingerprint(samples, _name(model), getattr(config, "model_type", "") or "")
        kept[names] = (wanted, found, now)
        if samples and torch.stack([values for _, values in samples.values()]).isfinite().all():
            # it is this model's, and an edit that is applied at once need not look
            _checked.setdefault(model, weakref.WeakKeyDictionary())[found] = (_versions(model, samples), 0.0, False)
    return found


_checked: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
_taken: weakref.WeakKeyDictionary[nn.Module, dict] = weakref.WeakKeyDictionary()
_unedited: weakref.WeakKeyDictionary[nn.Module, dict[str, Sample]] = weakref.WeakKeyDictionary()


def _chosen(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The weights that are sampled: edited ones, the embeddings, and some others from all over the model."""
    embeddings = inner(first_layer(model))
    paths = list(walk(model))
    first = [f"{path}.weight" for path, module in paths if module is embeddings]
    others = [f"{path}.weight" for path, module in paths if path and is_matrix(module)]
    others = [name for name in others if name not in names]
    step = max(1, len(others) / OTHERS)
    some = [others[int(i * step)] for i in range(min(OTHERS, len(others)))]
    return list(dict.fromkeys([*names, *first, *some]))


def _weight(model: nn.Module, name: str) -> torch.Tensor | None:
    """The weight as a matrix of numbers, or None where there is none to read."""
    module: nn.Module | None = model
    path, parameter, index = _parts(name)
    for part in path:
        module = inner(module)._modules.get(part)
        if module is None:
            return None
    weight = getattr(inner(module), parameter, None)
    if index is not None and isinstance(weight, torch.Tensor):
        weight = weight[index] if weight.dim() == 3 and index < len(weight) and type(weight) is nn.Parameter else None
    if type(weight) is not nn.Parameter and type(weight) is not torch.Tensor:
        return None
    readable = weight.dim() == 2 and weight.is_floating_point() and weight.element_size() > 1 and not weight.is_meta
    return weight.detach() if readable and weight.numel() and type(weight.data) is torch.Tensor else None


@functools.lru_cache(2 * MOST_WEIGHTS)
def _parts(name: str) -> tuple[tuple[str, ...], str, int | None]:
    """The modules on the way to a weight, the parameter, and the expert."""
    path, parameter, index = parsed(name) or (name.removesuffix(".weight"), "weight", None)
    return tuple(path.split(".")), parameter, index


def _versions(model: nn.Module, names: Sequence[str] | Mapping[str, Any]) -> tuple:
    """What PyTorch counts of writes to these weights."""
    weights = [_weight(model, name) for name in names]
    return tuple(None if w is None else 0 if w.is_inference() else w._version for w in weights)


@torch.no_grad()
def _sampled(model: nn.Module, wanted: Mapping[str, tuple[int, int] | None]) -> dict[str, Sample]:
    """Samples of the weights as they were before our own edits, at the places of the given shapes."""
    model = unwrapped(model)
    edited, known = backups_of(model), _unedited.setdefault(model, {})
    result: dict[str, Sample] = {}
    read: dict[torch.device, list[tuple[str, tuple[int, int], torch.Tensor]]] = {}
    for name, shape in wanted.items():
        weight = _weight(model, name)
        if weight is None:
            continue
        if name in edited:
            weight = edited[name]
            if weight is None:  # without a backup: as it was when it was first seen
                if name in known and shape in (None, known[name].shape):
                    result[name] = known[name]
                continue
            weight = arrived(weight)
        shape = shape or tuple(weight.shape)
        # More or fewer tokens than then make no other model of it.
        if weight.shape[1] == shape[1] and len(weight) >= shape[0]:
            values = weight[_places(*shape, weight.device)].to(torch.bfloat16)
            read.setdefault(weight.device, []).append((name, shape, values))
    for found in read.values():
        values = torch.stack([each for *_, each in found]).cpu()  # one copy off the device
        for (name, shape, _), each in zip(found, values, strict=True):
            result[name] = known[name] = Sample(shape, each)
    return {name: result[name] for name in wanted if name in result}


@functools.lru_cache(512)
@torch.inference_mode(False)
def _places(rows: int, columns: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """SAMPLES places spread over a matrix: the steps of a golden ratio, and of another irrational, through each.

    Kept, a copy for each device: one for each weight and edit would be as many waits for a GPU.
    """
    i = torch.arange(1, SAMPLES + 1, dtype=torch.float64, device="cpu")
    row, column = (i * 0.6180339887498949) % 1 * rows, (i * 0.7548776662466927) % 1 * columns
    return row.long().to(device), column.long().to(device)


def _name(model: nn.Module) -> str:
    """What the model is called, without the folders that it came from."""
    return PurePath(str(getattr(getattr(model, "config", None), "name_or_path", "") or "")).name


def _title(model: nn.Module) -> str:
    return Fingerprint({}, _name(model), getattr(getattr(model, "config", None), "model_type", "") or "").title
