"""What has been applied to a model's weights, so that any edit can be taken out again, bit for bit.

Rounding makes W + a + b - a differ from W + b. The ledger therefore keeps one copy of each weight as it was
before the first edit and, on a revert, restores it and replays the edits that stay, in their order. Updates
are deterministic, so the result has the bits of a model that never saw the reverted edit.

Each change is journalled: what the weights were (intent), the write, done. A change that fails or is interrupted is
undone at once and, where a second interrupt strikes that, at the next call. A checksum of each weight after our write
tells whether somebody else has written to it since, by whatever way; then nothing is reverted.

The ledger knows edits by a handle, any object, and by the bits of their factors. It lies on the model itself, so that
a deepcopy of the model carries its own; a pickled model loses it, and says so.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from . import ops, reference, sharding
from .layers import Layer, check_untied, check_writable, named_layers, unwrapped
from .locks import exclusive, lock_of
from .ops.rank1_update import _choose
from .updates import (
    Application,
    Conversion,
    Factors,
    Update,
    Weight,
    arrived,
    backup_of,
    checksum,
    extend,
    folded,
    foreign,
    measured,
    own_factors,
    read_flags,
    rebuild,
)

__all__ = ["BACKUPS", "ROUNDINGS", "Ledger", "forget_edits", "ledger_of", "lock_of", "revert_all", "settle"]

log = logging.getLogger("mendfast")

BACKUPS = ("cpu", "device", "none")
ROUNDINGS = ("nearest", "stochastic")
_ATTRIBUTE = "_mendfast_ledger"
Weights = Mapping[str, Weight]


@dataclass(frozen=True, eq=False)
class _Plan:
    """A change that was found to be right: the weights that it touches, before and after it."""

    layers: Mapping[str, Layer]
    before: Weights
    after: Weights
    saved: Mapping[str, torch.Tensor] = field(default_factory=dict)  # bits that no backup could bring back


@dataclass(frozen=True, eq=False)
class _Pending:
    """The intent of a change: how things were before it."""

    weights: Weights
    plan: _Plan


def _exclusively(method: Callable) -> Callable:
    """One thread at a time, when what the last call had to leave undone is done."""

    @functools.wraps(method)
    @torch.inference_mode(False)
    @torch.no_grad()
    def run(self: Ledger, *args: Any, **kwargs: Any) -> Any:
        with exclusive(self.model):
            self._settle()
            self._refuse_damaged()
            return method(self, *args, **kwargs)

    return run


class Ledger:
    """The edits in one model's weights. Every method is whole or leaves all as it was; :func:`ledger_of` gives it."""

    def __init__(self, model: nn.Module, forgotten: bool = False) -> None:
        self._model = weakref.ref(model)
        self._forgotten = forgotten
        self._weights: Weights = {}
        self._pending: _Pending | None = None
        self._damaged: tuple[str, ...] = ()
        self._numbers = itertools.count()
        # Memory of backups in ordinary memory that were used up: to get it anew from the system, page by page, takes
        # longer than the whole update.
        self._spare: dict[str, torch.Tensor] = {}

    @property
    def model(self) -> nn.Module:
        return self._model()

    @_exclusively
    def settle(self) -> None:
        """Undo what an interrupted change left, as every other method does first."""

    @_exclusively
    def apply(self, handle: object, factors: Factors, **how: Any) -> None:
        """Write weight -= alpha * delta^T u into the named weights; :meth:`revert` with ``handle`` takes it out.

        Args:
            handle: what the caller knows the edit by.
            factors: weight name -> (u [T, m], delta [T, n], alpha). Copied.
            how: backup ("cpu"), rounding ("nearest") and seed (0) as :meth:`mendfast.Edit.apply_`; again (False): apply
                what is applied already, by its handle or by the bits of its factors, once more.

        Raises:
            ValueError, TypeError: before anything is written.
        """
        self._change(self._planned(self._weights, handle, factors, **how))

    @_exclusively
    def revert(self, handles: Sequence[object], digest_of: Callable[[Any], tuple | None] | None = None) -> None:
        """Take edits out, all of them in one replay of those that stay.

        An edit that was applied twice goes once for each time that it is named, the last one first. A handle that
        is not known is looked for by its digest.

        Each edit that was written after one that goes is rounded anew, so that no state on the way can be kept for
        it: n edits that are reverted one by one, oldest first, are n^2 / 2 updates, and all at once none.
        """
        self._change(self._without(self._applications(handles, digest_of, "revert")))

    @_exclusively
    def replace(self, handle: object, factors: Factors, *, again: bool = True, **how: Any) -> None:
        """Revert ``handle``, if it is applied, and apply it with these factors, in one change: the weights never hold
        neither. It becomes the newest. Without ``again``, a ValueError if another handle has the same factors."""
        first = self._without([a for a in self._all_applications() if a.handle is handle])
        weights = {**self._weights, **first.before, **first.after}
        then = self._planned(weights, handle, factors, again=again, **how)
        self._change(
            _Plan(
                {**then.layers, **first.layers},
                {**then.before, **first.before},
                {**first.after, **then.after},
                then.saved,
            )
        )

    @_exclusively
    def revert_all(self) -> None:
        """Every weight as it was before the first edit."""
        self._change(self._without(self._all_applications()))

    @contextlib.contextmanager
    def lifted(self) -> Iterator[None]:
        """Within the block the weights hold what they held before the first edit, and then, bit for bit, what they do
        now. The model's lock is kept. Raises a ValueError where :meth:`revert_all` does."""
        with exclusive(self.model):
            plan = self._going()
            try:
                try:
                    self._carry_out(plan)
                    for name in plan.before:
                        self._spare.pop(name, None)  # the backups are still needed
                    yield
                finally:
                    self._put_back(plan)
            finally:  # again, should the first be interrupted
                self._put_back(plan)

    @_exclusively
    def _going(self) -> _Plan:
        return self._without(self._all_applications())

    @_exclusively
    def _carry_out(self, plan: _Plan) -> None:
        self._change(plan)

    @_exclusively
    def _put_back(self, plan: _Plan) -> None:
        if not all(name in self._weights for name in plan.before):
            without = {name: replace(weight, sum=None) for name, weight in plan.after.items()}
            self._change(_Plan(plan.layers, without, plan.before))

    def holds(self, handle: object) -> bool:
        """Whether ``handle`` is applied."""
        return any(application.handle is handle for application in self._all_applications())

    @torch.inference_mode(False)
    def forget(self) -> None:
        """Take the weights as they are, edits and all, for the model's own: nothing can be reverted any more."""
        with exclusive(self.model):
            self._weights, self._pending, self._damaged = {}, None, ()

    def free(self) -> None:
        """Give back the memory that is kept for the next backup."""
        self._spare.clear()

    @_exclusively
    def fidelity(self, handle: object, digest_of: Callable[[Any], tuple | None] | None = None) -> dict[str, float]:
        """Per weight of the edit ||applied - intended|| / ||intended||, of all the edits on the weight together."""
        plan = self._without(self._applications([handle], digest_of, "measure"))
        result = {}
        for name, weight in plan.before.items():
            present = plan.layers[name].local.detach().double()
            before = arrived(weight.backup).to(present.device, torch.float64)
            after = before.clone()
            for u in weight.updates:
                reference.rank1_update_(after, u.u.to(after.device), u.delta.to(after.device), u.alpha, layout=u.layout)
            intended, applied = after - before, present - before
            squares = torch.stack([(applied - intended).square().sum(), intended.square().sum()])
            gap, norm = sharding.summed(squares, plan.layers[name].weight).sqrt().tolist()
            result[name] = gap / norm if norm > 0 else 0.0
        return result

    # -- what is to be done --------------------------------------------------------------------------------

    def _planned(
        self,
        weights: Weights,
        handle: object,
        factors: Factors,
        *,
        backup: str = "cpu",
        rounding: str = "nearest",
        seed: int = 0,
        again: bool = False,
    ) -> _Plan:
        """An application upon ``weights``, all of it checked."""
        if backup not in BACKUPS:
            raise ValueError(f"backup is {backup!r}; choose one of {', '.join(BACKUPS)}.")
        if rounding not in ROUNDINGS:
            raise ValueError(f"rounding is {rounding!r}; choose 'nearest' or 'stochastic'.")
        if not isinstance(seed, int) or not 0 <= seed < 2**63 - max(1, len(factors)):
            raise ValueError(f"seed is {seed!r}; it must be a whole number from 0 to 2^63 - 1.")
        sharding.reshard(self.model)
        found = named_layers(self.model, list(factors))
        layers = {layer.name: layer for layer in found}
        if len(layers) < len(found):
            raise ValueError(f"The edit names one weight twice: {', '.join(factors)}.")
        for layer in found:
            check_writable(layer)
        check_untied(self.model, found)
        own = {layer.name: own_factors(layer, *factor) for layer, factor in zip(found, factors.values(), strict=True)}
        digest, bounds = measured(own)  # of the whole update, the same in every process
        if not all(map(math.isfinite, bounds)):
            us, deltas, alphas = zip(*own.values(), strict=True)
            ops.check_finite(us, deltas, alphas, list(own))
        if not again:
            applied = [u.application for w in weights.values() for u in w.updates]
            if any(a.handle is handle for a in applied):
                raise ValueError("This edit is applied to the model already; revert it first.")
            if digest is not None and any(a.digest == digest for a in applied):
                raise ValueError(
                    "An edit with the same factors is applied to the model already (the same file, loaded twice?); "
                    "revert it first, or insist: apply_(model, again=True)."
                )
        known = {name: weights[name] for name in layers if name in weights}
        unchanged = {name: w for name, w in known.items() if w is self._weights.get(name)}
        known |= self._verified(layers, unchanged)
        if missing := [n for n, w in known.items() if w.backup is None and w.steps and backup != "none"]:
            raise ValueError(
                f"{missing[0]} carries an edit that was applied without a backup, so this one could not be "
                "reverted; apply with backup='none', or reload the model."
            )
        application = Application(handle, digest, next(self._numbers))
        before, after, saved = {}, {}, {}
        for i, ((name, layer), bound) in enumerate(zip(layers.items(), bounds, strict=True)):
            present = layer.local
            limit = torch.finfo(present.dtype)
            update = Update(
                application, *sharding.sliced(layer.weight, *own[name], layer.layout), layer.layout,
                rounding, seed + i, _choose(present, rounding, None),
                # below half a unit in the last place of the largest number nothing finite becomes infinite
                large=not bound < limit.max * limit.eps / 8,
            )  # fmt: skip
            weight = known.get(name)
            if weight is None:
                kind = (present.dtype, present.device)
                copy = backup_of(present, backup, self._spare.pop(name, None))
                weight = Weight(copy, (), kind, kind, checksum(present) if copy is None else None)
            before[name], after[name] = weight, replace(weight, steps=(*weight.steps, update))
            if weight.backup is None and update.large:
                saved[name] = present.detach().clone()  # until the result is seen to be finite
        return _Plan(layers, before, after, saved)

    def _without(self, gone: Sequence[Application]) -> _Plan:
        """The applications' going, refused if they can't."""
        touched = {n: w for n, w in self._weights.items() if any(u.application in gone for u in w.updates)}
        for name, weight in touched.items():
            if weight.backup is None:
                raise ValueError(
                    f"{name} was edited without a backup (backup='none'); its earlier bits are gone. Reload the model."
                )
        layers = self._layers(touched)
        before, after = self._verified(layers, touched), {}
        for name, weight in before.items():
            stay = (s for s in weight.steps if not isinstance(s, Update) or s.application not in gone)
            after[name] = replace(weight, steps=tuple(stay))
        return _Plan(layers, before, after)

    def _applications(
        self, handles: Sequence[object], digest_of: Callable[[Any], tuple | None] | None, verb: str
    ) -> list[Application]:
        everything, found = self._all_applications(), []
        for handle in handles:
            left = [a for a in everything if a not in found]
            mine = [a for a in left if a.handle is handle]
            if not mine and left and digest_of is not None and (digest := digest_of(handle)) is not None:
                mine = [a for a in left if a.digest == digest]
            if not mine:
                hint = " The model was pickled with edits in its weights, and this copy doesn't know them."
                raise ValueError(
                    f"This edit is not applied to the model, so there is nothing to {verb}."
                    + (hint if self._forgotten else "")
                )
            found.append(mine[-1])
        return found

    def _all_applications(self) -> list[Application]:
        """Oldest first."""
        found = {u.application for weight in self._weights.values() for u in weight.updates}
        return sorted(found, key=lambda application: application.number)

    def _layers(self, names: Iterable[str]) -> dict[str, Layer]:
        sharding.reshard(self.model)
        return {layer.name: layer for layer in named_layers(self.model, list(names))}

    def _verified(self, layers: Mapping[str, Layer], weights: Mapping[str, Weight]) -> dict[str, Weight]:
        """The weights, conversions noted; a ValueError where somebody else has written."""
        result, differs = {}, {}
        for name, weight in weights.items():
            check_writable(layers[name])
            present = layers[name].local
            kind, expected = (present.dtype, present.device), weight.sum
            if kind != weight.kind:
                steps = (*weight.steps, Conversion(*kind))
                weight = replace(weight, steps=steps, kind=kind)
                if weight.backup is None:
                    raise ValueError(foreign(name))
                expected = checksum(folded(weight))
                weight = replace(weight, sum=expected)
            result[name] = weight
            differs[name] = checksum(present) != expected.to(present.device)
        flags = sharding.anywhere(read_flags(list(differs.values())), [layers[name].weight for name in differs])
        for name, differ in zip(differs, flags, strict=True):
            if differ:
                raise ValueError(foreign(name))
        return result

    # -- doing it ------------------------------------------------------------------------------------------

    def _change(self, plan: _Plan) -> None:
        """Carry out a plan and enter it in the books; or leave weights and books as they were."""
        try:
            self._pending = _Pending(self._weights, plan)
            new, anew = [], []
            for name, weight in plan.after.items():
                present, old = plan.layers[name].local.detach(), plan.before[name].steps
                if weight.steps[: len(old)] == old:
                    new.append((present, weight.steps[len(old) :]))
                else:
                    anew.append((present, weight))
            extend(new)
            rebuild(anew)
            kept = {name: weight for name, weight in plan.after.items() if weight.updates}
            large = {n: plan.layers[n] for n, weight in kept.items() if any(update.large for update in weight.updates)}
            bad = ops.non_finite([layer.local for layer in large.values()])
            flags = sharding.anywhere([i in bad for i in range(len(large))], [layer.weight for layer in large.values()])
            if infinite := [name for name, flag in zip(large, flags, strict=True) if flag]:
                raise ValueError(
                    f"With this change {infinite[0]} would hold infinity: the update is too large for "
                    f"{str(kept[infinite[0]].kind[0]).removeprefix('torch.')}. Nothing was changed; use a smaller "
                    "step, or hold the model in bfloat16 or float32."
                )
            kept = {name: replace(weight, sum=checksum(plan.layers[name].local)) for name, weight in kept.items()}
            others = {name: weight for name, weight in self._weights.items() if name not in plan.after}
            self._weights, self._pending = {**others, **kept}, None
        except BaseException:
            try:
                self._settle()
            finally:  # again, should the first be interrupted
                self._settle()
            raise
        for name, weight in plan.before.items():
            on_cpu = weight.backup is not None and weight.backup.device == plan.layers[name].local.device
            if name not in kept and on_cpu and weight.backup.device.type == "cpu":
                self._spare[name] = weight.backup

    def _settle(self) -> None:
        """Undo the change that is pending, if there is one."""
        pending = self._pending
        if pending is None:
            return
        plan, lost = pending.plan, []
        for name, weight in plan.before.items():
            present = plan.layers[name].local.detach()
            if weight.sum is not None and bool(checksum(present) == weight.sum.to(present.device)):
                continue
            if name in plan.saved:
                present.copy_(plan.saved[name])
            elif weight.backup is not None:
                rebuild([(present, weight)])
            else:
                lost.append(name)
        if lost:
            log.warning("%s was partly written when an edit without a backup was interrupted", ", ".join(lost))
        self._damaged = tuple(dict.fromkeys((*self._damaged, *lost)))
        self._weights, self._pending = pending.weights, None

    def _refuse_damaged(self) -> None:
        if self._damaged:
            raise ValueError(
                f"{', '.join(self._damaged)} was partly written when an edit without a backup (backup='none') was "
                "interrupted, and can't be brought back. Reload the model; or load its weights again "
                "(load_state_dict), then mendfast.forget_edits(model)."
            )

    # -- copies --------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict) -> Ledger | None:
        """The ledger of the copied model: it knows the same edits, and reverts them from backups of its own."""
        model = memo.get(id(self.model))
        if model is None:
            return None
        with exclusive(self.model):
            return self._copy_for(model)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _copy_for(self, model: nn.Module) -> Ledger:
        self._settle()
        copied = Ledger(model, self._forgotten)
        copied._damaged = self._damaged
        copied._numbers = itertools.count(next(self._numbers))
        copied._weights = {
            name: replace(w, backup=None if w.backup is None else arrived(w.backup).clone())
            for name, w in self._weights.items()
        }
        return copied

    def __reduce__(self) -> tuple:
        # a pickle of the model must not need this package
        return bool, (bool(self._forgotten or self._weights),)


def ledger_of(model: nn.Module) -> Ledger:
    """The model's ledger; a wrapped model (compiled, DataParallel) shares that of the one inside."""
    model = unwrapped(model)
    found = vars(model).get(_ATTRIBUTE)
    if not isinstance(found, Ledger):
        with exclusive(model):
            found = vars(model).get(_ATTRIBUTE)
            if not isinstance(found, Ledger):
                found = vars(model)[_ATTRIBUTE] = Ledger(model, bool(found))
    if found.model is None:  # a shallow copy that outlived the original
        found._model = weakref.ref(model)
    return found


def backups_of(model: nn.Module) -> dict[str, torch.Tensor | None]:
    """Each edited weight as it was before its first edit; None without a backup."""
    found = vars(unwrapped(model)).get(_ATTRIBUTE)
    return {name: w.backup for name, w in found._weights.items()} if isinstance(found, Ledger) else {}


def settle(model: nn.Module) -> None:
    """Undo what an interrupted change of ``model`` left; a ValueError where that can't be."""
    if isinstance(found := vars(unwrapped(model)).get(_ATTRIBUTE), Ledger):
        found.settle()


def revert_all(model: nn.Module) -> None:
    """Take all edits out of ``model``: the bits from before the first. Takes as long as reverting one.

    Raises:
        ValueError: an edit was applied without a backup, or somebody else has written to an edited weight.
    """
    ledger_of(model).revert_all()


def forget_edits(model: nn.Module) -> None:
    """Take the weights as they are now for the model's own; edits in them can't be reverted any more.

    For a model whose weights were loaded anew or trained on after an edit. Frees the backups.
    """
    ledger_of(model).forget()
    ledger_of(model).free()
