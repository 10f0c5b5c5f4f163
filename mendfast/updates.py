"""One update of one weight: checked, measured, written, and replayed upon a copy of what was there before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from . import ops
from .layers import Layer
from .ops.rank1_update import unchecked_group_

Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor, float]]
"""weight name -> (u [T, m], delta [T, n], alpha): weight -= alpha * delta^T u, for a weight [n, m]."""
_BLOCK = 64  # words whose plain sum enters the checksum
_KEPT = 2**18  # of the numbers that weight them: 2 MiB on each device
_kept_weights: dict[torch.device, torch.Tensor] = {}
_TOGETHER = 2**24  # bytes of factors that are put together to be measured


@dataclass(frozen=True, eq=False)
class Application:
    """One edit, applied once."""

    handle: object
    digest: tuple | None  # of its factors; None if they change nothing
    number: int


@dataclass(frozen=True, eq=False)
class Update:
    """One weight's part of an edit, as it was applied; the factors are the ledger's own."""

    application: Application
    u: torch.Tensor
    delta: torch.Tensor
    alpha: float
    layout: str
    rounding: str
    seed: int
    backend: str  # a replay takes the same, or its bits could differ
    large: bool  # whether it could overflow the weight's dtype


@dataclass(frozen=True, eq=False)
class Conversion:
    """model.half(), model.to(...) between two edits."""

    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, eq=False)
class Weight:
    """What was done to one weight since ``backup``, oldest first."""

    backup: torch.Tensor | None
    steps: tuple[Update | Conversion, ...]
    home: tuple[torch.dtype, torch.device]  # before the first step
    kind: tuple[torch.dtype, torch.device]  # after the last
    sum: torch.Tensor | None = None  # checksum after the last

    @property
    def updates(self) -> list[Update]:
        return [step for step in self.steps if isinstance(step, Update)]


def checksum(values: torch.Tensor) -> torch.Tensor:  # [] int64
    """A sum over the bits of ``values``, by position: one pass, on their device, whatever the strides.

    64-bit words are summed by blocks of 64, and the blocks weighted by position; words that change places within one
    block go unseen, any other change of a single element never.
    """
    return checksums(values.detach().unsqueeze(0))[0]


def checksums(values: torch.Tensor) -> torch.Tensor:  # [N, ...] -> [N] int64
    """Of each of them its :func:`checksum`."""
    flat, count = values.detach().contiguous().view(-1), len(values)
    size, each = flat.element_size(), flat.numel() // max(1, count)
    if each * size % 8 == 0 and flat.storage_offset() * size % 8 == 0:
        words = flat.view(torch.int64)
    else:
        words = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[size]).long()
    places = len(words) // max(1, count)
    if places and places % _BLOCK == 0:
        places //= _BLOCK
        words = words.view(-1, _BLOCK).sum(1)
    return (words.view(count, places) * _weights_of(places, words.device)).sum(1)


def _weights_of(places: int, device: torch.device) -> torch.Tensor:  # [places] int64
    """By what the checksum multiplies each word; odd. Those of the first places are the same for each number of
    them, so that one tensor for a device, which is kept, serves all."""
    if places > _KEPT:
        return _made(places, device)
    if (found := _kept_weights.get(device)) is None:
        with torch.inference_mode(False):
            # a copy waits for itself, so that other streams may read it
            found = _kept_weights[device] = _made(_KEPT, torch.device("cpu")).to(device)
    return found[:places]


def _made(places: int, device: torch.device) -> torch.Tensor:
    numbers = torch.arange(1, places + 1, device=device) * -0x61C8864680B583EB
    return numbers ^ numbers >> 29 | 1


def measured(factors: Factors) -> tuple[tuple | None, list[float]]:
    """A digest of the factors (None: they change nothing), and of each update a bound on its elements' magnitude, NaN
    or infinite where the factors are. One synchronisation per device."""
    if not any(len(u) for u, _, _ in factors.values()):
        return None, [0.0 * alpha for _, _, alpha in factors.values()]
    together: dict[tuple, list[int]] = {}
    given = list(factors.values())
    for i, (u, delta, _) in enumerate(given):
        small = max(u.nbytes, delta.nbytes) * len(given) <= _TOGETHER
        key = (u.shape, u.dtype, delta.shape, delta.dtype, u.device) if small else (i,)
        together.setdefault(key, []).append(i)
    found = []
    for members in together.values():
        us, deltas = (_stacked([given[i][side] for i in members]) for side in (0, 1))
        if us.is_floating_point() and us.element_size() < 2:
            us, deltas = us.float(), deltas.float()
        bounds = (_widest(us) * _widest(deltas)).sum(1)
        found.append(torch.stack([bounds.view(torch.int64), checksums(us), checksums(deltas)], 1))
    found = [each.cpu() for each in found] if len({each.device for each in found}) > 1 else found
    numbers = torch.cat(found).cpu()[torch.tensor([i for members in together.values() for i in members]).argsort()]
    products = numbers[:, 0].clone().view(torch.float64).tolist()
    bounds = [bound * abs(alpha) for bound, (_, _, alpha) in zip(products, given, strict=True)]
    sums = zip(factors.items(), numbers[:, 1:].tolist(), strict=True)
    return tuple(sorted((name, *pair, alpha) for (name, (_, _, alpha)), pair in sums)), bounds


def _stacked(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0].unsqueeze(0)


def _widest(rows: torch.Tensor) -> torch.Tensor:
    """The largest magnitude in each row, NaN where there is one: [N, T, k] -> [N, T] float64."""
    if not rows.numel():
        return rows.new_zeros(rows.shape[:2], dtype=torch.float64)
    low, high = torch.aminmax(rows, dim=2)
    return torch.maximum(-low, high).double()


def own_factors(layer: Layer, u: Any, delta: Any, alpha: Any) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Copies of the factors where the weight is; what does not fit is refused by the weight's name."""
    for side, value, width in (("u", u, layer.m), ("delta", delta, layer.n)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{side} of {layer.name} is a {type(value).__name__}; factors are tensors.")
        if not value.is_floating_point() or value.layout != torch.strided:
            raise TypeError(
                f"{side} of {layer.name} is {value.dtype} ({value.layout}); factors are dense and floating-point."
            )
        if value.dim() != 2 or value.shape[1] != width or len(value) != len(u):
            raise ValueError(
                f"{side} of {layer.name} is {tuple(value.shape)}; it must be [{len(u) if u.dim() else 'T'}, {width}]."
            )
    if isinstance(alpha, torch.Tensor) and alpha.numel() == 1:
        alpha = alpha.item()
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise TypeError(f"alpha of {layer.name} is {alpha!r}; it must be a number.")
    return *(value.detach().to(layer.weight.device, copy=True) for value in (u, delta)), float(alpha)


def read_flags(flags: Sequence[torch.Tensor]) -> list[bool]:
    """The flags' values, one synchronisation for each device."""
    result: list[bool] = [False] * len(flags)
    for device in {flag.device for flag in flags}:
        mine = [i for i, flag in enumerate(flags) if flag.device == device]
        for i, value in zip(mine, torch.stack([flags[i] for i in mine]).tolist(), strict=True):
            result[i] = value
    return result


def backup_of(weight: torch.Tensor, backup: str, spare: torch.Tensor | None) -> torch.Tensor | None:
    if backup == "none":
        return None
    if spare is not None and (spare.shape, spare.dtype, weight.device.type) == (weight.shape, weight.dtype, "cpu"):
        return spare.copy_(weight.detach())
    if backup == "device" or weight.device.type == "cpu":
        return weight.detach().clone()
    return _sent(weight.detach())


def _sent(values: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory that may still be under way: see :func:`arrived`.

    A large one is made of a copy on the device, which is gone when it has arrived, so that ``values`` can be written at
    once: to leave a GPU takes such a weight longer than all else that an edit does. Of ``values`` themselves where
    that has no room.
    """
    copy, device = torch.empty(values.shape, dtype=values.dtype, pin_memory=True), values.device
    stream = torch.cuda.current_stream(device)
    if values.nbytes >= _LARGE:
        with contextlib.suppress(torch.OutOfMemoryError):
            values = values.clone(memory_format=torch.contiguous_format)
            if device not in _senders:
                _senders[device] = torch.cuda.Stream(device)
            _senders[device].wait_stream(stream)
            stream = _senders[device]
            values.record_stream(stream)
    with torch.cuda.stream(stream):
        copy.copy_(values, non_blocking=True)
        _under_way[copy] = stream.record_event()
    return copy


def arrived(backup: torch.Tensor) -> torch.Tensor:
    """The backup, all of it: the host waits for what is still being copied off a GPU."""
    if (event := _under_way.pop(backup, None)) is not None:
        event.synchronize()
    return backup


_LARGE = 2**24  # bytes
_senders: dict[torch.device, Any] = {}  # torch.cuda.Stream
_under_way = WeakTensorKeyDictionary()  # backup -> torch.cuda.Event at the end of its copying


def extend(jobs: Sequence[tuple[torch.Tensor, Sequence[Update]]]) -> None:
    """Write new updates into their weights, each weight's in their order."""
    for batch in _rounds(jobs):
        _write(batch)


def rebuild(jobs: Sequence[tuple[torch.Tensor, Weight]]) -> None:
    """Restore the weights' backups and replay their steps."""
    replayed = []
    for present, weight in jobs:
        if weight.home != weight.kind or len(weight.updates) < len(weight.steps):
            present.copy_(folded(weight))
        else:
            present.copy_(arrived(weight.backup), non_blocking=True)
            replayed.append((present, weight.steps))
    for batch in _rounds(replayed):
        _rewrite(batch)


def _rounds(jobs: Sequence[tuple[torch.Tensor, Sequence[Update]]]) -> Iterator[list[tuple[torch.Tensor, Update]]]:
    """Batches that hold each weight once."""
    for i in range(max((len(steps) for _, steps in jobs), default=0)):
        yield [(present, steps[i]) for present, steps in jobs if i < len(steps)]


def folded(weight: Weight) -> torch.Tensor:
    """What the weight holds after its steps, made where each of them was made."""
    dtype, device = weight.home
    values = arrived(weight.backup).to(device, dtype, copy=True)
    for step in weight.steps:
        if isinstance(step, Conversion):
            values = values.to(step.device, step.dtype)
        else:
            _rewrite([(values, step)])
    return values


def _write(batch: Sequence[tuple[torch.Tensor, Update]]) -> None:
    """One update of each weight."""
    for backend in dict.fromkeys(u.backend for _, u in batch):
        nearest = [(w, u) for w, u in batch if u.backend == backend and u.rounding == "nearest"]
        ops.rank1_update_group_(
            [w for w, _ in nearest],
            [u.u for _, u in nearest],
            [u.delta for _, u in nearest],
            [u.alpha for _, u in nearest],
            layouts=[u.layout for _, u in nearest],
            backend=backend,
        )
    for w, u in batch:
        if u.rounding == "stochastic":  # each with its own seed, so that a replay draws the same
            ops.rank1_update_(
                w, u.u, u.delta, u.alpha, layout=u.layout, rounding=u.rounding, seed=u.seed, backend=u.backend
            )


def _rewrite(batch: Sequence[tuple[torch.Tensor, Update]]) -> None:
    """:func:`_write` of updates that were written once, hence right."""
    for backend, rounding in dict.fromkeys((u.backend, u.rounding) for _, u in batch):
        mine = [(w, u) for w, u in batch if (u.backend, u.rounding) == (backend, rounding)]
        unchecked_group_(
            [w for w, _ in mine],
            [u.u for _, u in mine],
            [u.delta for _, u in mine],
            [u.alpha for _, u in mine],
            [u.layout == "in_out" for _, u in mine],
            [u.seed for _, u in mine],
            rounding == "stochastic",
            backend,
        )


def foreign(name: str) -> str:
    """What to say where somebody else has written to an edited weight."""
    return (
        f"{name} was written by something else since mendfast edited it (an optimiser step, load_state_dict, "
        "another tool, a conversion to a narrower dtype and back), so the edits can't be told from that. Nothing was "
        "changed; reload the model, or keep the weights as they are: mendfast.forget_edits(model)."
    )
