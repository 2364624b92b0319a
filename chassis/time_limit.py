"""Interrupts what takes too much of a processor, in a program's main thread. Not pure: signals.

It reaches whatever looks for signals, as Python's own code and its regular expressions do.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def processor_seconds(seconds_max: float) -> Iterator[None]:
    """Raises TimeoutError in the block when it takes more. One at a time, and in the main thread."""

    def interrupt(number: int, frame: object) -> None:
        raise TimeoutError(f"took more than {seconds_max:g} s of a processor")

    before = signal.signal(signal.SIGVTALRM, interrupt)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds_max)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
