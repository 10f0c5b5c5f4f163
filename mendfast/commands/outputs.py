"""Places that a command will write to, tried before its work starts, so that none is lost at the end."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from .failures import sentence


def check_file(option: str, path: str | None) -> None:
    """A ValueError that says why ``path`` can't become a file; nothing is left behind.

    What writes there makes a temporary file beside it and missing directories above it, and so does this.
    """
    if path is None:
        return
    try:
        mode = _mode(path)
        if mode is not None and stat.S_ISDIR(mode):
            raise ValueError(f"{path} is a directory; name a file.")
        if mode is not None and not stat.S_ISREG(mode):
            raise ValueError(f"{path} is a device or a pipe; name a file.")
        if path.endswith(("/", os.sep)) or not Path(path).name:
            raise ValueError(f"{path!r} names no file.")
        _try(Path(path).parent, f".{Path(path).name}.")
    except (OSError, ValueError) as error:
        raise ValueError(f"{option} can't be written. {sentence(error)}") from error


def check_directory(option: str, path: str | None) -> None:
    """A ValueError that says why nothing can be written into the directory ``path``, which need not exist."""
    if path is None:
        return
    try:
        mode = _mode(path)
        if not path or (mode is not None and not stat.S_ISDIR(mode)):
            raise ValueError(f"{path!r} is no directory; name another.")
        _try(Path(path), ".mendfast.")
    except (OSError, ValueError) as error:
        raise ValueError(f"{option} can't be written. {sentence(error)}") from error


def check_new_directory(option: str, path: str | None) -> None:
    """:func:`check_directory` of one that is not there yet, or is empty: nothing is ever written over."""
    check_directory(option, path)
    if path is not None and Path(path).is_dir() and any(Path(path).iterdir()):
        raise ValueError(f"{option} is {path}, which exists and is not empty; name a new directory.")


def check_new_file(option: str, path: str | None) -> None:
    """:func:`check_file` of one that is not there yet."""
    check_file(option, path)
    if path is not None and Path(path).exists():
        raise ValueError(f"{option} is {path}, which exists; name a new file.")


def _mode(path: str) -> int | None:
    try:
        return os.stat(path).st_mode
    except FileNotFoundError:
        if os.path.islink(path):
            raise ValueError(f"{path} is a link to nowhere; remove it, or name another path.") from None
        return None


def _try(directory: Path, prefix: str) -> None:
    """Make a file where ``directory`` is, or will be."""
    while _mode(str(directory)) is None:
        directory = directory.parent
    handle, name = tempfile.mkstemp(dir=directory, prefix=prefix)
    os.close(handle)
    os.unlink(name)
