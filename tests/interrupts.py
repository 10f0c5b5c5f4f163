"""Exceptions at a chosen line of mendfast's own code, as an interrupt or a lack of memory would raise them."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path

import mendfast

PACKAGE = Path(mendfast.__file__).parent


class Interrupt(BaseException):
    """Not an Exception, like KeyboardInterrupt."""


def run(call: Callable[[], object], files: tuple[str, ...], at: int | None = None) -> tuple[int, bool]:
    """Call with an :class:`Interrupt` before the ``at``-th line that runs in ``files``.

    Returns how many lines of these ran, and whether the interrupt came out of the call.
    """
    wanted, count = {str(PACKAGE / file) for file in files}, 0

    def global_trace(frame, event, argument):
        return local_trace if frame.f_code.co_filename in wanted else None

    def local_trace(frame, event, argument):
        nonlocal count
        if event == "line":
            count += 1
            if count - 1 == at:
                sys.settrace(None)
                raise Interrupt
        return local_trace

    before, collecting = sys.gettrace(), gc.isenabled()
    gc.disable()  # lines of a generator that it collects are not the call's, and what they raise goes nowhere
    sys.settrace(global_trace)
    try:
        call()
    except Interrupt:
        return count, True
    finally:
        sys.settrace(before)
        if collecting:
            gc.enable()
    return count, False
