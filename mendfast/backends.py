"""Which implementation serves an op: the caller's choice, or the best that this machine has.

An op registers its backends, best first, each with a probe that says why it cannot serve a device, or None
if it can. A choice comes from the op's ``backend`` argument, else from ``with mendfast.backend("triton"):``,
else from the environment variable ``MENDFAST_BACKEND``, else it is "auto".
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator

import torch

log = logging.getLogger("mendfast")

NAMES = ("auto", "reference", "aten", "cpu", "triton", "cuda")
"""``cpu`` and ``cuda`` are the extensions, ``aten`` PyTorch's own library calls on any device, ``reference`` the
specification, slow."""
Probe = Callable[[torch.device], "str | None"]

_registry: dict[str, dict[str, Probe]] = {}
# A plain global and not a context variable: autograd runs backward passes in threads of its own.
_override: str | None = None
_logged: set[tuple[str, str, str]] = set()


def register(op: str, backends: dict[str, Probe]) -> None:
    """Name the backends of ``op``, best first. "reference" serves everything and need not be named."""
    _registry[op] = {**backends, "reference": lambda device: None}


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Within the block every op takes backend ``name``, one of :data:`NAMES`."""
    global _override
    previous, _override = _override, _check(name)
    try:
        yield
    finally:
        _override = previous


def choose(op: str, device: torch.device, explicit: str | None = None) -> str:
    """The backend that serves ``op`` on ``device``; a RuntimeError with the reason if the chosen one can't."""
    probes = _registry[op]
    name = _check(explicit or _override or os.environ.get("MENDFAST_BACKEND") or "auto")
    if name == "auto":
        name = next(b for b, probe in probes.items() if probe(device) is None)
        if (op, device.type, name) not in _logged:
            _logged.add((op, device.type, name))
            log.info("%s on %s: backend %s", op, device.type, name)
        return name
    if name not in probes:
        raise RuntimeError(f"{op} has no backend {name!r}; it has {', '.join(probes)}.")
    reason = probes[name](device)
    if reason is not None:
        served = ", ".join(b for b, probe in probes.items() if probe(device) is None)
        raise RuntimeError(f"{op}: backend {name!r} can't serve {device}: {reason}. Here you can use: {served}.")
    return name


def preferred(op: str, device: torch.device) -> str:
    """:func:`choose` for what need not be done in the chosen way: the best backend where ``op`` lacks it."""
    name = _override or os.environ.get("MENDFAST_BACKEND") or "auto"
    return choose(op, device, name if name in ("reference", "aten") else "auto")


def explain(device: torch.device) -> list[dict[str, str]]:
    """For every op: the backend that "auto" takes on ``device``, and why each better one was left."""
    rows = []
    for op, probes in sorted(_registry.items()):
        left = []
        for name, probe in probes.items():
            reason = probe(device)
            if reason is None:
                break
            left.append(f"{name}: {reason}")
        rows.append({"op": op, "backend": name, "left": "; ".join(left)})
    return rows


def _check(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"Backend {name!r} is unknown; choose one of {', '.join(NAMES)}.")
    return name
