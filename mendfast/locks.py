"""One re-entrant lock per model, for whatever changes its hooks, modes or weights."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn

from .layers import unwrapped

_locks: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


def lock_of(model: nn.Module):
    """The model's lock; a wrapped model (compiled, DataParallel) shares that of the one inside.

    It keeps threads that edit one model apart from each other. It does not hold up their forward passes: who reads
    a model while another thread writes to it takes the lock for the pass, ``with lock_of(model): model(...)``.
    """
    return _locks.setdefault(unwrapped(model), threading.RLock())


@contextlib.contextmanager
def holding(lock) -> Iterator[None]:
    """``with lock:`` that lets go of it wherever an interrupt strikes."""
    held = None
    try:
        try:
            held = lock.acquire()
            yield
        finally:
            if held:
                held = lock.release()
    finally:
        if held:
            held = lock.release()


def exclusive(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Within the block no other thread edits ``model``, attaches to it, or makes an edit of it."""
    return holding(lock_of(model))
