"""What has been applied to a model's weights, so that any edit can be taken out again, bit for bit.

Rounding makes W + a + b - a differ from W + b. The ledger therefore keeps one copy of each weight as it was
before the first edit and, on a revert, restores it and replays the edits that stay, in their order. Updates
are deterministic, so the result has the bits of a model that never saw the reverted edit.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from . import ops, reference
from .layers import Layer

if TYPE_CHECKING:
    from .edit import Edit

BACKUPS = ("cpu", "device", "none")


@dataclass(frozen=True)
class Update:
    """One weight's part of an edit, as it was applied."""

    layer: Layer
    u: torch.Tensor
    delta: torch.Tensor
    alpha: float
    rounding: str
    seed: int


@dataclass
class _Weight:
    """The applied updates of one weight, oldest first."""

    backup: torch.Tensor | None
    applied: list[tuple[Edit, Update]] = field(default_factory=list)
    version: int = -1  # the weight's version counter after our last write


class Ledger:
    def __init__(self) -> None:
        self._weights: dict[str, _Weight] = {}
        # Memory of backups in ordinary memory that were used up: to get it anew from the system, page by page, takes
        # longer than the whole update.
        self._spare: dict[str, torch.Tensor] = {}

    def apply(self, edit: Edit, updates: Sequence[Update], backup: str) -> None:
        if any(edit is other for weight in self._weights.values() for other, _ in weight.applied):
            raise ValueError("This edit is applied to the model already; revert it first.")
        fresh = {}
        for update in updates:
            name, weight = update.layer.name, self._weights.get(update.layer.name)
            if weight is None:
                fresh[name] = _Weight(_copy(update.layer.weight, backup, self._spare.pop(name, None)))
            elif weight.backup is None and backup != "none":
                raise ValueError(
                    f"{name} carries an edit that was applied without a backup, so this one could not be "
                    "reverted; apply with backup='none', or reload the model."
                )
            elif weight.version != update.layer.weight._version:
                raise ValueError(_foreign(name))
        try:
            _write(updates)
        except BaseException:
            self._restore(updates, fresh)
            raise
        for update in updates:
            weight = self._weights.setdefault(update.layer.name, fresh.get(update.layer.name))
            weight.applied.append((edit, update))
            weight.version = update.layer.weight._version

    def revert(self, edit: Edit) -> None:
        touched = self._touched(edit, "revert")
        replayed = []
        for weight, update in touched:
            _assign(update.layer.weight, weight.backup)
            weight.applied = [(e, u) for e, u in weight.applied if e is not edit]
            replayed += [u for _, u in weight.applied]
        for layer_updates in _rounds(replayed):
            _write(layer_updates)
        for weight, update in touched:
            weight.version = update.layer.weight._version
            if not weight.applied:
                del self._weights[update.layer.name]
                if update.layer.weight.device.type == "cpu":
                    self._spare[update.layer.name] = weight.backup

    def free(self) -> None:
        """Give back the memory that is kept for the next backup."""
        self._spare.clear()

    def fidelity(self, edit: Edit) -> dict[str, float]:
        result = {}
        for weight, update in self._touched(edit, "measure"):
            # Against the bits before the first edit: all the edits on the weight together.
            before = weight.backup.to(update.layer.weight.device, torch.float64)
            after = before.clone()
            for _, u in weight.applied:
                reference.rank1_update_(
                    after, u.u.to(after.device), u.delta.to(after.device), u.alpha, layout=u.layer.layout
                )
            intended = after - before
            applied = update.layer.weight.detach().double() - before
            norm = intended.norm()
            result[update.layer.name] = float((applied - intended).norm() / norm) if norm > 0 else 0.0
        return result

    def _touched(self, edit: Edit, verb: str) -> list[tuple[_Weight, Update]]:
        touched = [(w, u) for w in self._weights.values() for e, u in w.applied if e is edit]
        if not touched:
            raise ValueError(f"This edit is not applied to the model, so there is nothing to {verb}.")
        for weight, update in touched:
            if weight.backup is None:
                raise ValueError(
                    f"{update.layer.name} was edited without a backup (backup='none'); its earlier bits are "
                    "gone. Reload the model."
                )
            if weight.version != update.layer.weight._version:
                raise ValueError(_foreign(update.layer.name))
        return touched

    def _restore(self, updates: Sequence[Update], fresh: dict[str, _Weight]) -> None:
        """After a failed write: every weight back to what it was before it, where a backup allows."""
        for update in updates:
            weight = self._weights.get(update.layer.name) or fresh[update.layer.name]
            if weight.backup is not None:
                _assign(update.layer.weight, weight.backup)
                _write([u for _, u in weight.applied])
                weight.version = update.layer.weight._version


_ledgers: weakref.WeakKeyDictionary[nn.Module, Ledger] = weakref.WeakKeyDictionary()


def ledger_of(model: nn.Module) -> Ledger:
    return _ledgers.setdefault(model, Ledger())


def _foreign(name: str) -> str:
    return (
        f"{name} was written by something else since mendfast edited it (an optimiser step, load_state_dict, "
        "another tool), so the edits can't be told from that; reload the model."
    )


def _copy(weight: torch.Tensor, backup: str, spare: torch.Tensor | None) -> torch.Tensor | None:
    if backup == "none":
        return None
    if spare is not None and (spare.shape, spare.dtype, weight.device.type) == (weight.shape, weight.dtype, "cpu"):
        return spare.copy_(weight.detach())
    if backup == "device" or weight.device.type == "cpu":
        return weight.detach().clone()
    copy = torch.empty(weight.shape, dtype=weight.dtype, pin_memory=True)
    return copy.copy_(weight.detach(), non_blocking=True)


@torch.no_grad()
def _assign(weight: torch.Tensor, value: torch.Tensor) -> None:
    weight.copy_(value, non_blocking=True)


def _rounds(updates: Sequence[Update]) -> list[list[Update]]:
    """The updates in batches that hold each weight once, each weight's in their order."""
    rounds: list[list[Update]] = []
    depth: dict[str, int] = {}
    for update in updates:
        i = depth.get(update.layer.name, 0)
        depth[update.layer.name] = i + 1
        if i == len(rounds):
            rounds.append([])
        rounds[i].append(update)
    return rounds


@torch.no_grad()
def _write(updates: Sequence[Update]) -> None:
    nearest = [u for u in updates if u.rounding == "nearest"]
    if nearest:
        ops.rank1_update_group_(
            [u.layer.weight for u in nearest],
            [u.u.to(u.layer.weight.device) for u in nearest],
            [u.delta.to(u.layer.weight.device) for u in nearest],
            [u.alpha for u in nearest],
            layouts=[u.layer.layout for u in nearest],
        )
    for u in updates:
        if u.rounding == "stochastic":  # each with its own seed, so that a replay draws the same
            device = u.layer.weight.device
            ops.rank1_update_(
                u.layer.weight,
                u.u.to(device),
                u.delta.to(device),
                u.alpha,
                layout=u.layer.layout,
                rounding=u.rounding,
                seed=u.seed,
            )
