"""Which implementation serves an op: the caller's choice, or the best that this machine has.

:data:`TABLE` says what each backend of each op takes. A choice comes from the op's ``backend`` argument, else from
``with mendfast.backend("triton"):``, else from the environment variable ``MENDFAST_BACKEND``, else it is "auto": the
first backend in the op's row of the table that takes the device, its compute capability and the dtypes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

log = logging.getLogger("mendfast")

NAMES = ("auto", "reference", "aten", "cpu", "triton", "cuda")
"""``cpu`` and ``cuda`` are the extensions, ``aten`` PyTorch's own library calls on any device, ``reference`` the
specification, slow."""


class Serves(NamedTuple):
    """What a backend takes; an empty tuple is anything."""

    devices: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    capability: tuple[int, int] = (0, 0)
    """The oldest compute capability of a CUDA device."""


_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
_CUDA = Serves(("cuda",), _SINGLE, (8, 0))
_CPU = Serves(("cpu",))  # what its kernels leave out (dtypes, many rows) they hand to PyTorch by themselves
_ANY = Serves()
TABLE: dict[str, dict[str, Serves]] = {
    "editor_mlp": {"triton": _CUDA, "cpu": _CPU, "aten": _ANY, "reference": _ANY},
    "frozen_linear": {"cpu": _CPU, "aten": _ANY, "reference": _ANY},
    "kl_divergence": {"triton": _CUDA, "cpu": _CPU, "aten": _ANY, "reference": _ANY},
    "least_squares": {"aten": _ANY, "reference": _ANY},
    "lowrank_linear": {"cpu": _CPU, "aten": _ANY, "triton": _CUDA, "reference": _ANY},
    "rank1_update_": {"cuda": _CUDA, "triton": _CUDA, "cpu": _CPU, "aten": _ANY, "reference": _ANY},
    "running_stats_": {"triton": _CUDA, "cpu": _CPU, "aten": _ANY, "reference": _ANY},
    "token_nll": {"triton": _CUDA, "aten": _ANY, "reference": _ANY},
}
"""Of every op its backends, best first, and what they take. Linear layers of a frozen model, with the loss under a
frozen head, are the op "frozen_linear"."""


class Place(NamedTuple):
    """Where an op is to run, as far as the table asks."""

    device: str  # its type
    capability: tuple[int, int] | None = None  # of a CUDA device
    rocm: bool = False


MISSING: dict[str, Callable[[], str | None]] = {}
"""Of a backend that needs something installed: a function that says what is missing, or None. The ops fill it."""

# A plain global and not a context variable: autograd runs backward passes in threads of its own.
_override: dict[str | None, str] = {}  # by op; None: of all ops
_logged: set[tuple[str, str, str]] = set()


@contextlib.contextmanager
def backend(name: str, *ops: str) -> Iterator[None]:
    """Within the block ``ops``, or every op if none is named, take backend ``name``, one of :data:`NAMES`.

    No op has every backend: "cuda" is of rank1_update_ alone, and token_nll has no "cpu".
    ``with mendfast.backend("cuda", "rank1_update_"):`` leaves the other ops as they were.
    """
    global _override
    _check(name)
    for op in ops:
        if op not in TABLE:
            raise ValueError(f"There is no op {op!r}; the ops are {', '.join(TABLE)}.")
    previous = _override
    _override = previous | dict.fromkeys(ops, name) if ops else {None: name}
    try:
        yield
    finally:
        _override = previous


def refusal(op: str, name: str, place: Place, dtypes: Sequence[torch.dtype] = ()) -> str | None:
    """Why backend ``name`` of ``op`` can't serve these dtypes there, or None. What is installed is not asked."""
    serves = TABLE[op][name]
    interpreted = _interpreted(name)
    if _elsewhere(name, serves, place):
        what, where = {
            "cuda": ("the CUDA extension runs", "CUDA devices"),
            "cpu": ("the CPU extension runs", "CPUs"),
            "triton": ("Triton kernels run", "CUDA devices"),
        }[name]
        emulates = " (TRITON_INTERPRET=1 emulates)" if name == "triton" else ""
        return f"{what} on {where}, and this is {place.device!r}{emulates}"
    if serves.capability > (0, 0) and not interpreted:
        if place.rocm:
            return "its code and tables are for Nvidia's GPUs, and this PyTorch is built for ROCm"
        if place.capability is not None and place.capability < serves.capability:
            have, needed = (".".join(map(str, c)) for c in (place.capability, serves.capability))
            return f"it needs compute capability {needed} or newer, and this is {have}"
    return _refused_dtypes(serves, dtypes)


def _interpreted(name: str) -> bool:
    return name == "triton" and _environment("TRITON_INTERPRET") == "1"


def _environment(name: str) -> str | None:
    # to ask for what is missing raises and catches, which takes longer
    return os.environ[name] if name in os.environ else None


def _elsewhere(name: str, serves: Serves, place: Place) -> bool:
    return bool(serves.devices) and place.device not in serves.devices and not _interpreted(name)


def _refused_dtypes(serves: Serves, dtypes: Sequence[torch.dtype]) -> str | None:
    other = [d for d in dict.fromkeys(dtypes) if serves.dtypes and d not in serves.dtypes]
    if not other:
        return None
    named, served = (", ".join(str(d).removeprefix("torch.") for d in ds) for ds in (other, serves.dtypes))
    return f"it serves {served}, and there is {named}"


def _constant(function: Callable) -> Callable:
    """torch.compiler.assume_constant_result, whose call would load the whole compiler at import."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def _capability(kind: str, index: int | None) -> tuple[int, int] | None:
    if kind != "cuda":
        return None
    return torch.cuda.get_device_capability(index)


@_constant
def _missing(name: str) -> str | None:
    return MISSING[name]() if name in MISSING else None


def place_of(device: torch.device) -> Place:
    if device.type == "cuda" and not torch.cuda.is_available():
        return Place("cuda")
    return Place(device.type, _capability(device.type, device.index), torch.version.hip is not None)


def probe(op: str, name: str, device: torch.device, dtypes: Sequence[torch.dtype] = ()) -> str | None:
    """Why backend ``name`` can't serve ``op`` here, or None."""
    return refusal(op, name, place_of(device), dtypes) or _missing(name)


def choose(
    op: str, device: torch.device, explicit: str | None = None, dtypes: Sequence[torch.dtype] = ()
) -> str:
    """The backend that serves ``op`` on ``device`` for ``dtypes``.

    An explicit choice that can't raises, with the reason: TypeError for a dtype, RuntimeError for all else.
    """
    row = TABLE[op]
    name = _check(explicit or ambient(op))
    if name == "auto":
        place = place_of(device)
        name = next(b for b in row if not _elsewhere(b, row[b], place) and probe(op, b, device, dtypes) is None)
        if (op, device.type, name) not in _logged:
            _logged.add((op, device.type, name))
            log.info("%s on %s: backend %s", op, device.type, name)
        return name
    if name not in row:
        owners = ", ".join(other for other, backends in TABLE.items() if name in backends)
        raise RuntimeError(
            f"{op} has no backend {name!r}, which is of {owners}; it has {', '.join(row)}. To choose for one op "
            f"alone: with mendfast.backend({name!r}, {owners.split(', ')[0]!r})."
        )
    reason = probe(op, name, device, dtypes)
    if reason is not None:
        served = [b for b in row if probe(op, b, device, dtypes) is None]
        kind = TypeError if reason == _refused_dtypes(row[name], dtypes) else RuntimeError
        best = "aten" if "aten" in served else served[0]
        raise kind(
            f"{op}: backend {name!r} can't serve {device}: {reason}. Use backend={best!r}. Here you can use: "
            f"{', '.join(served)}."
        )
    return name


def settled(op: str, name: str, device: str, explicit: str | None = None) -> bool:
    """Whether :func:`choose` would take ``name`` on that type of device, for "auto" as it has done before."""
    asked = explicit or ambient(op)
    return (
        (asked == name or asked == "auto" and (op, device, name) in _logged)
        and _missing(name) is None
        and not _interpreted("triton")
    )


def preferred(op: str, device: torch.device) -> str:
    """:func:`choose` for what need not be done in the chosen way: the best backend where ``op`` lacks it."""
    name = ambient(op)
    return choose(op, device, name if name in ("reference", "aten") else "auto")


def explain(device: torch.device, dtypes: Sequence[torch.dtype] = ()) -> list[dict[str, str]]:
    """For every op: the backend that "auto" takes on ``device``, and why each better one was left."""
    rows = []
    for op, row in TABLE.items():
        left = []
        for name in row:
            reason = probe(op, name, device, dtypes)
            if reason is None:
                break
            left.append(f"{name}: {reason}")
        rows.append({"op": op, "backend": name, "left": "; ".join(left)})
    return rows


def ambient(op: str) -> str:
    """The choice for ``op`` where its ``backend`` argument makes none."""
    return _override.get(op) or _override.get(None) or _environment("MENDFAST_BACKEND") or "auto"


def _triton_missing() -> str | None:
    return None if importlib.util.find_spec("triton") else "Triton isn't installed (pip install triton)"


MISSING["triton"] = _triton_missing


def _check(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"Backend {name!r} is unknown; choose one of {', '.join(NAMES)}.")
    return name
