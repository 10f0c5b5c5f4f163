"""What a command says of an error: one sentence, with the way out where there is one."""

from __future__ import annotations

import errno
import os
import re

from safetensors import SafetensorError

from ..schema import brief, shown

LONGEST = 600  # characters of a sentence
EXPECTED = (
    OSError, ValueError, TypeError, RuntimeError, ArithmeticError, MemoryError, ImportError, EOFError, SafetensorError,
)  # fmt: skip
"""Errors of what a command was given or of the machine; others are mistakes of the program, and show where."""

_OF_PATHS = {
    errno.ENOENT: "is not there; check the path",
    errno.EISDIR: "is a directory, where a file is needed; name a file",
    errno.ENOTDIR: "leads through a file as if that were a directory; name another path",
    errno.EEXIST: "is there already, as a file; name another path, or remove it",
    errno.EACCES: "is not open to this user; change its permissions, or name another path",
    errno.EPERM: "is not open to this user; change its permissions, or name another path",
    errno.EROFS: "is on a read-only file system; name a path elsewhere",
    errno.ENAMETOOLONG: "has a name that is too long; shorten it",
    errno.ENOTEMPTY: "is a directory that is not empty; name another path, or remove it",
    errno.EBUSY: "is in use by another program; end that, or name another path",
    errno.ETXTBSY: "is a program that runs; end that, or name another path",
    errno.EXDEV: "is on another file system; name a path on one",
    errno.EINVAL: "is no path that this file system takes; name another",
    errno.ELOOP: "is a loop of symbolic links; name the file itself",
}
_OF_TARGET = (errno.EEXIST, errno.ENOTEMPTY, errno.EISDIR)  # of a renaming, these are about where it goes
_OF_PLACE = {
    errno.ENOSPC: "There is no space left on the disk{}; make room, or write elsewhere.",
    errno.EDQUOT: "The disk quota is used up{}; make room, or write elsewhere.",
    errno.EFBIG: "The file would be larger than files may be here{}; raise the limit (ulimit -f), or write elsewhere.",
    errno.EMFILE: "Too many files are open{}; raise the limit (ulimit -n).",
    errno.ENOMEM: "There is not enough memory{}.",
}


def sentence(error: BaseException) -> str:
    """One line that says what is wrong, of at most :data:`LONGEST` characters."""
    if isinstance(error, OSError) and error.errno is not None:
        text = _of_the_system(error)
    elif isinstance(error, ImportError):
        text = _of_an_import(error)
    elif isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        said = f" ({brief(_one_line(error), 160)})" if str(error) else ""
        text = f"There is not enough memory{said}; take smaller batches or a smaller model, or --dtype bfloat16."
    elif isinstance(error, SafetensorError):
        text = f"A safetensors file is not whole ({brief(_one_line(error), 160)}); make or fetch it again."
    else:
        text = _one_line(error) or f"{type(error).__name__}, without a word why"
    return brief(text, LONGEST)


def _one_line(error: BaseException) -> str:
    return re.sub(r"\s*\n\s*", " ", str(error)).strip()


def _of_an_import(error: ImportError) -> str:
    said, package = _one_line(error), (error.name or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and package and "pip install" not in said:
        return f"This needs the package {brief(package, 60)}, which is not installed: pip install {brief(package, 60)}"
    if package and "pip install" not in said:
        return (
            f"The package {brief(package, 60)} is installed and can't be used ({brief(said, 200)}); install it again, "
            "or another version: mendfast doctor shows what is there."
        )
    return said or "A package is missing; mendfast doctor shows what is there."


def _of_the_system(error: OSError) -> str:
    # Bytes that are no text come from the file system; a number is an open file's.
    named = error.filename if error.errno not in _OF_TARGET or error.filename2 is None else error.filename2
    path = os.fsdecode(named) if isinstance(named, (str, bytes)) else None
    if error.errno in _OF_PLACE:
        return _OF_PLACE[error.errno].format(f" of {shown(path, 200)}" if path else "")
    if path and error.errno in _OF_PATHS:
        return f"{shown(path, 200)} {_OF_PATHS[error.errno]}."
    return f"{shown(path, 200)}: {error.strerror}" if path else str(error.strerror or error)
