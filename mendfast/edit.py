"""Edit: the factors of one update of a model's weights. Attach, apply, revert, sum, save, load."""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from .adapters import peft
from .capture import lowrank_updates
from .experts import parsed
from .files import read_tensors, write_tensors
from .fingerprint import Fingerprint
from .hub import About, OnHub
from .layers import Layer, named_layers, unwrapped
from .ledger import ledger_of, settle
from .requests import EditRequest
from .schema import brief, check_real, parse_json, shown, some
from .sharding import full
from .updates import measured


class Factor(NamedTuple):
    """One weight's update: W <- W - alpha * delta^T u, for W [n, m]."""

    u: torch.Tensor  # [T, m] float32
    delta: torch.Tensor  # [T, n] float32
    alpha: float


class Protecting(Protocol):
    """What protects text of a model, as a MendEditor does."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def metric(self) -> Any: ...  # mendfast.metric.Metric, or None


class Edit(OnHub):
    """A low-rank update of some of a model's weights.

    Args:
        factors: weight name -> (u [T, m], delta [T, n], alpha); the weight of an nn.Linear loses
            ``alpha * delta.T @ u``, that of a Conv1D the transpose.
        model_type: the kind of model it was made for (``model.config.model_type``), checked on use.
        requests: the edits it makes, for people to read.
        fingerprint: of the base model that it was made for, checked on use.

    The same Edit is applied to a model once, unless one insists (``apply_(..., again=True)``).
    Edits of one model stack and come out in any order.
    """

    hub_file = "edit.safetensors"

    def __init__(
        self,
        factors: Mapping[str, tuple[torch.Tensor, torch.Tensor, float]],
        model_type: str | None = None,
        requests: Sequence[tuple[str, str]] = (),
        fingerprint: Fingerprint | None = None,
    ):
        self.factors = {name: Factor(*factor) for name, factor in factors.items()}
        self.model_type = model_type
        self.fingerprint = fingerprint
        self.requests = tuple(EditRequest(*request) for request in requests)
        for name, (u, delta, _) in self.factors.items():
            if u.dim() != 2 or delta.dim() != 2 or len(u) != len(delta):
                raise ValueError(
                    f"The factors of {name} are {tuple(u.shape)} and {tuple(delta.shape)}; "
                    "they must be u [T, m] and delta [T, n] with the same T."
                )

    def __repr__(self) -> str:
        what = "; ".join(f"{r.prompt!r} -> {r.target!r}" for r in self.requests[:3])
        more = f"; and {len(self.requests) - 3} more" if len(self.requests) > 3 else ""
        return f"Edit({len(self.factors)} weights, {self.num_bytes():,} bytes{': ' + what + more if what else ''})"

    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for f in self.factors.values() for t in (f.u, f.delta))

    def to(self, device: torch.device | str) -> Edit:
        """A copy with the factors on ``device``."""
        factors = {name: Factor(u.to(device), d.to(device), a) for name, (u, d, a) in self.factors.items()}
        return Edit(factors, self.model_type, self.requests, self.fingerprint)

    @staticmethod
    def sum(edits: Sequence[Edit]) -> Edit:
        """The simultaneous edit: the sum of the separate updates, as one low-rank update."""
        edits = list(edits)
        if not edits:
            raise ValueError("Edit.sum was given no edits; pass at least one.")
        kinds = {edit.model_type for edit in edits} - {None}
        if len(kinds) > 1:
            raise ValueError(f"These edits were made for different models ({', '.join(sorted(kinds))}).")
        names = list(dict.fromkeys(name for edit in edits for name in edit.factors))
        factors = {}
        for name in names:
            parts = [edit.factors[name] for edit in edits if name in edit.factors]
            alpha = parts[0].alpha
            if len({(part.u.shape[1], part.delta.shape[1]) for part in parts}) > 1:
                raise ValueError(f"These edits hold {name} in different shapes; they belong to different models.")
            # One alpha for all: what differs goes into delta.
            alpha = alpha if all(part.alpha == alpha for part in parts) else 1.0
            deltas = [part.delta if part.alpha == alpha else part.delta * part.alpha for part in parts]
            device = parts[0].u.device
            factors[name] = Factor(
                torch.cat([part.u.to(device) for part in parts]), torch.cat([d.to(device) for d in deltas]), alpha
            )
        prints = [edit.fingerprint for edit in edits if edit.fingerprint is not None]
        merged = functools.reduce(Fingerprint.merged, prints) if prints else None
        return Edit(factors, next(iter(kinds), None), [r for edit in edits for r in edit.requests], merged)

    # -- on a model ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def attached(self, model: nn.Module, *, strict: bool = False) -> Iterator[nn.Module]:
        """Within the block ``model`` answers as edited; its weights are not touched, nor copied.

        Works on frozen, quantised and sharded weights too. Blocks nest: the updates add up. Every pass within the
        block sees the edit, those of other threads included; a copy of the model made within it does not. A compiled
        model runs uncompiled meanwhile. In training, call ``backward`` within the block, since activation
        checkpointing runs the forward pass again then. ``model.save_pretrained`` refuses: it would write the
        unedited weights. Keys and values cached before the block are of the unedited model: begin with a new cache
        in it (``past_key_values=None``), and with another after it.

        Args:
            strict: a ValueError, and not a warning, where the edit's fingerprint is of another base model.
        """
        settle(model)
        layers = self.layers_of(model, strict)
        factors = dict(zip((layer.name for layer in layers), self.factors.values(), strict=True))
        with lowrank_updates(layers, factors, model):
            yield model

    def apply_(
        self,
        model: nn.Module,
        *,
        backup: str = "cpu",
        rounding: str = "nearest",
        seed: int = 0,
        again: bool = False,
        strict: bool = False,
    ) -> Edit:
        """Write the update into the model's weights, all of them or none.

        That holds through interrupts too, with one exception: weights that have no backup can't be brought back
        when an interrupt strikes between two of them. The model then refuses all further edits, and says why.
        Threads may edit one model at a time each; a pass that runs while another thread writes sees a mixture, unless
        it holds the lock: ``with mendfast.ledger.lock_of(model): model(...)``. A process that is forked after PyTorch
        has used its threads hangs in its first update, as in any other parallel operation: start it by "spawn".
        Keys and values cached before (``past_key_values``, a static cache) are of the model as it was; drop them, or
        reset the cache, after this and after :meth:`revert_`.
        Of a model that is sharded over processes (FSDP2, tensor parallelism) each process must make the call, and
        writes its own slice.

        Args:
            backup: where the bits of the unedited weights are kept for :meth:`revert_`: "cpu" (pinned when
                the weights are on a GPU, and copied from a copy there while it goes on), "device", or "none" (no way
                back). One copy of each edited weight, however many edits are stacked. Of weights on the CPU its
                memory is kept, after the last edit was taken out, for the next.
            rounding: "nearest", or "stochastic", which keeps small updates of 16-bit weights from vanishing.
            seed: of stochastic rounding, 0 to 2^63 - 1.
            again: apply it even if this edit, or one with the same factors, is applied already.
            strict: a ValueError, and not a warning, where the edit's fingerprint is of another base model.

        Raises:
            ValueError, TypeError: the edit is applied already, was made for another model, does not fit, holds NaN
                or infinity or would put infinity into a weight, a weight can't be written in place (quantised,
                tied, meta), or something else has written to an edited weight. Nothing is changed then.
        """
        self.layers_of(model, strict)
        ledger_of(model).apply(self, self.factors, backup=backup, rounding=rounding, seed=seed, again=again)
        return self

    def revert_(self, model: nn.Module) -> Edit:
        """Take the update out again: the weights become, bit for bit, what they would be without this edit.

        Other edits may have been applied before or since, and stay; they are replayed, so that taking out many is
        faster by :meth:`revert_many` or :func:`mendfast.revert_all`. An edit with the same factors, loaded from a file
        perhaps, does as well as the one that was applied. A model that was converted since (``half()``, ``to()``)
        becomes what it would be, had it been converted without this edit.

        Raises:
            ValueError: the edit is not applied to ``model``, was applied without a backup, or something else
                has written to the weights since (then no order of updates gives what the caller wants). What was
                written stays.
        """
        return Edit.revert_many([self], model)[0]

    @staticmethod
    def revert_many(edits: Sequence[Edit], model: nn.Module) -> Sequence[Edit]:
        """:meth:`revert_` of all of them, or of none, with one replay of the edits that stay."""
        ledger_of(model).revert(edits, lambda edit: edit._digest(model))
        return edits

    def fidelity(self, model: nn.Module) -> dict[str, float]:
        """Per weight ||applied - intended|| / ||intended||: what rounding cost. The edit must be applied, with
        a backup. 16-bit weights lose the part of an update that is below half a unit in their last place."""
        return ledger_of(model).fidelity(self, lambda edit: edit._digest(model))

    @torch.no_grad()
    def disturbance(self, editor: Protecting) -> dict[str, float]:
        """Per weight E|S x|^2 / E|W x|^2 over the text that ``editor`` protects: what the edit S may change elsewhere.

        W are the weights without edits. :func:`disturbance_in_words` says it to people.

        Raises:
            ValueError: nothing is protected; the edit is of another model.
        """
        if editor.metric is None:
            raise ValueError(
                "Nothing is protected, so there is no telling what this edit disturbs: call editor.protect(texts), or "
                "editor.protect() for the model's own words."
            )
        layers = self.layers_of(editor.model)
        with ledger_of(editor.model).lifted():
            return {
                layer.name: editor.metric.disturbance(layer.name, *factor, full(layer.weight), layer.layout)
                for layer, factor in zip(layers, self.factors.values(), strict=True)
            }

    @torch.no_grad()
    def _digest(self, model: nn.Module) -> tuple | None:
        layers = named_layers(model, list(self.factors))
        named = zip(layers, self.factors.values(), strict=True)
        return measured({layer.name: (u, delta.to(u.device), float(alpha)) for layer, (u, delta, alpha) in named})[0]

    def layers_of(self, model: nn.Module, strict: bool = False) -> list[Layer]:
        """The layers of ``model`` that the edit changes, in the order of its factors; ValueError: it has others."""
        kind = getattr(getattr(unwrapped(model), "config", None), "model_type", None)
        if self.model_type is not None and kind is not None and kind != self.model_type:
            raise ValueError(f"This edit was made for a {self.model_type} model; this one is a {kind}.")
        layers = named_layers(model, list(self.factors))
        for layer, (u, delta, _) in zip(layers, self.factors.values(), strict=True):
            if (u.shape[1], delta.shape[1]) != layer.shape:
                raise ValueError(
                    f"This edit was made for another model: it holds {layer.name} with {u.shape[1]} inputs and "
                    f"{delta.shape[1]} outputs, and here it has {layer.m} and {layer.n}."
                )
        if self.fingerprint is not None:
            self.fingerprint.check(model, "This edit", strict=strict)
        return layers

    # -- on disk -------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: the factors, and in its metadata the requests. Atomic; the same edit gives the
        same bytes.

        Raises:
            ValueError, TypeError: what :meth:`load` would refuse.
        """
        tensors = {}
        for name, factor in self.factors.items():
            u, delta, alpha = _checked_factor(name, *factor, where="The edit")
            tensors[f"{name}:u"], tensors[f"{name}:delta"] = u, delta
            tensors[f"{name}:alpha"] = torch.tensor(alpha, dtype=torch.float64)
        requests = _checked_requests([list(request) for request in self.requests], "The edit")
        metadata = {
            "format": "mendfast.edit",
            "format_version": "1",
            "model_type": self.model_type or "",
            "requests": json.dumps(requests),
            "weights": json.dumps(list(self.factors)),
        }
        if self.fingerprint is not None:
            metadata["fingerprint"] = self.fingerprint.to_json()
        write_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Edit:
        """Read what :meth:`save` wrote. Factors of 16 or 64 bits become float32.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no edit, or holds what an edit does not; before any model sees it.
        """
        tensors, metadata = read_tensors(path, "edit")
        if missing := [name for name in ("weights", "model_type", "requests") if name not in metadata]:
            raise ValueError(f"{path} says that it is a mendfast edit but lacks {', '.join(missing)}; save it again.")
        names = parse_json(metadata["weights"], f"The list of weights in {path}")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{path} names its weights by {shown(names)}; it must be a list of names.")
        if len(set(names)) < len(names):
            raise ValueError(f"{path} names a weight twice: {some(n for n, k in Counter(names).items() if k > 1)}.")
        expected = {f"{name}:{part}" for name in names for part in Factor._fields}
        if missing := sorted(expected - set(tensors)):
            raise ValueError(f"{path} says that it is a mendfast edit but lacks {some(missing)}; save it again.")
        if extra := sorted(set(tensors) - expected):
            raise ValueError(f"{path} holds {some(extra)}, of weights that it does not name; save it again.")
        factors = {
            name: _checked_factor(name, *(tensors[f"{name}:{part}"] for part in Factor._fields), where=str(path))
            for name in names
        }
        requests = _checked_requests(parse_json(metadata["requests"], f"The list of requests in {path}"), str(path))
        base = Fingerprint.from_json(metadata.get("fingerprint"), str(path))
        return cls(factors, metadata["model_type"] or None, requests, base)

    def _about(self) -> About:
        title = self.fingerprint.title if self.fingerprint is not None else f"a {self.model_type or 'language'} model"
        text = f"A low-rank update of {len(self.factors)} weights of a language model, made by mendfast."
        load = """from transformers import AutoModelForCausalLM
from mendfast import Edit

model = AutoModelForCausalLM.from_pretrained("{base}")
edit = Edit.from_pretrained("{source}")
edit.apply_(model)     # written into the weights
edit.revert_(model)    # and out again, bit for bit"""
        return About("edit", title, None, text, load, self.requests)

    # -- elsewhere -----------------------------------------------------------------------------------------

    def export_peft(
        self, directory: str | Path, model: nn.Module, rank: int | None = None, *, overwrite: bool = False
    ) -> peft.PeftExport:
        """Write a LoRA adapter that PEFT and vLLM load; see :func:`mendfast.adapters.peft.export_peft`."""
        return peft.export_peft(self, directory, model, rank, overwrite=overwrite)

    @classmethod
    def from_peft(cls, directory: str | Path, model: nn.Module) -> Edit:
        """The edit that a LoRA adapter of ``model`` is, one of :meth:`export_peft` or of another origin.

        Raises:
            FileNotFoundError: there is no such adapter.
            ValueError: it is no plain LoRA of matrices, is damaged, or is for another model.
        """
        factors, requests = peft.read_peft(directory)
        edit = cls(factors, getattr(getattr(unwrapped(model), "config", None), "model_type", None), requests)
        try:
            edit.layers_of(model)
        except ValueError as error:
            raise ValueError(f"{directory} is an adapter for another model. {error}") from error
        return edit


def disturbance_in_words(disturbance: Mapping[str, float]) -> str:
    """What :meth:`Edit.disturbance` found, in a sentence: the root mean square change of the outputs, as a share."""
    if not disturbance:
        return "The edit changes no layer."
    name, worst = max(disturbance.items(), key=lambda item: item[1])
    percent = 100 * math.sqrt(worst)
    share = "less than 0.001" if percent < 0.001 else f"{percent:.0f}" if percent >= 10 else f"{percent:.2g}"
    return f"On protected text the edited layers' outputs change by {share} % at most ({name})."


def _checked_factor(name: str, u: torch.Tensor, delta: torch.Tensor, alpha: torch.Tensor | float, where: str) -> Factor:
    if not name.endswith(".weight") and parsed(name) is None:
        raise ValueError(
            f"{where} names the weight {shown(name)}; the name of a weight ends in .weight, or in [3] of expert 3."
        )
    what = f"{where}: the factor of {brief(name, 60)}"
    if isinstance(alpha, torch.Tensor):
        if alpha.dim():
            raise ValueError(f"{what}, alpha, is {shown(alpha)}; it must be a single number.")
        alpha = check_real(alpha, f"{what}, alpha,").item()
    if not math.isfinite(alpha):
        raise ValueError(f"{what}, alpha, is {alpha}; it must be finite.")
    sides = []
    for side, rows in (("u", u), ("delta", delta)):
        check_real(rows, f"{what}, {side},")
        if rows.dim() != 2:
            raise ValueError(f"{what}, {side}, is {shown(rows)}; it must be a matrix.")
        sides.append(check_real(rows.float(), f"{what}, {side}, in float32"))
    if len(u) != len(delta):
        raise ValueError(f"{what} has {len(u)} rows of u and {len(delta)} of delta; they must be as many.")
    return Factor(*sides, float(alpha))


def _checked_requests(requests: Any, where: str) -> list[list[str]]:
    for request in requests if isinstance(requests, list) else [requests]:
        pair = isinstance(request, list) and len(request) == 2 and all(isinstance(text, str) for text in request)
        if not isinstance(requests, list) or not pair:
            raise ValueError(f"{where} holds the request {shown(request)}; each must be a pair [prompt, target].")
    return requests
