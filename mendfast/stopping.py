"""Ctrl-C and SIGTERM while a run goes on: the step is finished and saved first, then they do what they did before."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM") if hasattr(signal, name))
_HEARD = b"\nFinishing the step, to save it.%s\n"


class Stopping:
    """Within the block a first signal is only noted, in :attr:`asked`; :meth:`hand_over` then gives it to the handler
    that was there before, whose business it is how a process ends.

    A second Ctrl-C goes to that handler at once, unless ``patient``: several processes must stop at the same step.
    Signals that the process ignores stay ignored, and outside of the main thread, which alone may set handlers, all of
    them stay as they are.
    """

    def __init__(self, patient: bool = False):
        self.patient = patient
        self.asked: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                before = signal.getsignal(number)
                if before not in (None, signal.SIG_IGN):
                    self._before[number] = before
                    signal.signal(number, self._heard)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        if self.asked is not None and kind is None:  # one that came too late for the loop
            self.hand_over()

    def _heard(self, number: int, frame: FrameType | None) -> None:
        again = self.asked is not None
        self.asked = number if self.asked is None else self.asked
        if again and number == signal.SIGINT and not self.patient:
            self._call(number, frame)
        elif not again:
            hint = b" Ctrl-C again stops at once." if number == signal.SIGINT and not self.patient else b""
            with contextlib.suppress(OSError):
                os.write(2, _HEARD % hint)  # print may be what was interrupted

    def hand_over(self, number: int | None = None) -> None:
        """Let the earlier handler have the signal, or signal ``number`` of another process. It may return."""
        number = number if self.asked is None else self.asked
        self.asked = None
        if number is not None:
            self._call(number, None)

    def _call(self, number: int, frame: FrameType | None) -> None:
        before = self._before.get(number, signal.getsignal(number))
        if callable(before):
            before(number, frame)
        elif before == signal.SIG_DFL:
            raise SystemExit(128 + number)  # the end that the system has for it, with what is open closed
