"""Trained editors that ship with the package; ``mendfast editors --build`` makes them.

A folder here is one editor, named after its base model: ``MendEditor.from_pretrained(name, model, tokenizer)``.
"""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent


def shipped() -> list[str]:
    """Names of the editors that ship."""
    return sorted(path.parent.name for path in HERE.glob("*/mend_config.json"))


def directory(name: str) -> Path | None:
    """Where the shipped editor of that name is; None if there is none."""
    path = HERE / name
    return path if (path / "mend_config.json").is_file() else None
