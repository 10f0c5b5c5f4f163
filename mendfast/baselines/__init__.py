"""The systems that MEND is compared with, and MEND as one of them."""

from __future__ import annotations

import difflib
from typing import Any

from torch import nn

from ..config import MendConfig
from .enn import EditableNetwork
from .fine_tuning import FineTuning, FineTuningBreadthFirst, FineTuningKL, FineTuningOneLayer
from .in_context import InContext
from .knowledge_editor import KnowledgeEditor
from .lora import Lora
from .mend import (
    Identity,
    Malmen,
    Mend,
    MendSum,
    NoIdentity,
    NoNormalisation,
    NoSharing,
    OnlyDelta,
    OnlySmaller,
    OnlyU,
)
from .rome import Memit, Rome
from .system import System
from .ultraedit import UltraEdit

SYSTEMS: dict[str, type[System]] = {
    system.key: system
    for system in (
        FineTuning,
        FineTuningKL,
        FineTuningOneLayer,
        FineTuningBreadthFirst,
        Lora,
        InContext,
        Rome,
        Memit,
        EditableNetwork,
        KnowledgeEditor,
        UltraEdit,
        Malmen,
        Mend,
        MendSum,
        Identity,
        NoSharing,
        NoNormalisation,
        NoIdentity,
        OnlyU,
        OnlyDelta,
        OnlySmaller,
    )
}


def make_system(key: str, model: nn.Module, tokenizer: Any, config: MendConfig | None = None, **options: Any) -> System:
    """The system that :data:`SYSTEMS` lists under ``key``, new and not yet fitted.

    Args:
        model: as :meth:`mendfast.MendEditor.from_model` takes it.
        tokenizer: likewise.
        config: likewise.
        options: those of the system's class, such as ``learning_rate`` of :class:`FineTuning`.

    Raises:
        ValueError: an unknown key; the near ones are named.
    """
    if key not in SYSTEMS:
        near = difflib.get_close_matches(key, SYSTEMS, n=3, cutoff=0.4) or list(SYSTEMS)
        raise ValueError(f"There is no system {key!r}. Near matches: {', '.join(near)}.")
    return SYSTEMS[key].make(model, tokenizer, config or MendConfig(), **options)


__all__ = [
    "SYSTEMS",
    "EditableNetwork",
    "FineTuning",
    "FineTuningBreadthFirst",
    "FineTuningKL",
    "FineTuningOneLayer",
    "Identity",
    "InContext",
    "KnowledgeEditor",
    "Lora",
    "Malmen",
    "Memit",
    "Mend",
    "MendSum",
    "Rome",
    "System",
    "UltraEdit",
    "make_system",
]
