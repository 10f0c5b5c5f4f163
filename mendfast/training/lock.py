"""One training per directory: a lock file that names the process, free again when that is gone."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..schema import brief

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = "training.lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
_held: dict[Path, tuple[int, int]] = {}  # of this process: the thread, and the process, as a fork holds nothing
_guard = threading.Lock()


class Occupied(RuntimeError):
    """Another training writes to the directory."""


@contextlib.contextmanager
def occupied(directory: str | Path) -> Iterator[None]:
    """Within the block nothing else that asks, in any process, trains in ``directory``; within it one may ask again.

    The file ``training.lock`` there holds the process id and the host. The system frees it when the process is gone,
    however it ended; a lock of another host, whose processes nobody here can see, must be removed by hand.

    Raises:
        Occupied: another process, or another thread, is there.
    """
    directory = Path(directory)
    made = [place for place in (directory, *directory.parents) if not place.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    path = directory.resolve() / NAME
    own = (os.getpid(), threading.get_ident())
    with _guard:
        holder = _held.get(path)
        if holder == own:
            nested = True
        elif holder is not None and holder[0] == own[0]:
            raise _refusal(directory, path, {"pid": own[0], "host": socket.gethostname()})
        else:
            nested, handle = False, _take(directory, path)
            _held[path] = own
    if nested:
        yield
        return
    try:
        yield
    finally:
        with _guard:
            _held.pop(path, None)
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(handle)
            with contextlib.suppress(OSError):  # a run that was refused leaves no empty directories
                for place in made:
                    place.rmdir()


def _take(directory: Path, path: Path) -> int:
    """The lock file, opened and ours."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            sure = _lock(handle)
            with contextlib.suppress(FileNotFoundError):
                # whoever held it until now has removed the file that was opened, and another may lie there
                if os.path.samestat(os.fstat(handle), os.stat(path)):
                    holder = _holder(handle)
                    if sure is False or _elsewhere(holder) or (sure is None and _alive(holder)):
                        raise _refusal(directory, path, holder)
                    text = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M")}
                    os.ftruncate(handle, 0)
                    os.lseek(handle, 0, os.SEEK_SET)
                    os.write(handle, json.dumps(text).encode())
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _lock(handle: int) -> bool | None:
    """Whether the file is ours; None where files can't be locked, and the process id has to tell."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return None
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def _holder(handle: int) -> dict[str, Any]:
    try:
        os.lseek(handle, 0, os.SEEK_SET)
        holder = json.loads(os.read(handle, 4096))
    except (ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _elsewhere(holder: dict[str, Any]) -> bool:
    return bool(holder.get("host")) and holder["host"] != socket.gethostname()


def _alive(holder: dict[str, Any]) -> bool:
    pid = holder.get("pid")
    if not isinstance(pid, int) or pid < 1 or pid == os.getpid() or os.name == "nt":  # where kill(pid, 0) would end it
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _refusal(directory: Path, path: Path, holder: dict[str, Any]) -> Occupied:
    who = f"process {brief(holder.get('pid', 'unknown'), 20)} on {brief(holder.get('host', 'this host'), 60)}"
    since = f", since {brief(holder['since'], 20)}" if "since" in holder else ""
    advice = "Wait for it, end it, or choose another output directory"
    if _elsewhere(holder):
        advice += f"; if it is gone, remove {path}"
    return Occupied(f"Another training is at work in {directory} ({who}{since}); the two would mix. {advice}.")
