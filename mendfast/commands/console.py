"""Where commands print: what users typed and models said goes in as :class:`rich.text.Text`, never as markup."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text


def make_console(quiet: bool = False) -> Console:
    """A console that leaves ``:smile:`` as it is written."""
    return Console(quiet=quiet, emoji=False)


def text(*parts: str | tuple[str, str]) -> Text:
    """Parts of a line, each as it is or with a style; nothing in them is markup."""
    return Text.assemble(*parts)


def plain(value: Any) -> Text:
    """A table's cell whose brackets are brackets."""
    return Text(str(value))
