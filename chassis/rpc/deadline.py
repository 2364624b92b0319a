"""The deadline of the call being served, as this task and the channels under it see it.

It sets no limit itself: the server does on entry, and each channel shaves what remains.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

# Seconds of time.monotonic(); gRPC's deadlines are real time, so no injected clock can stand in here.
_due: ContextVar[float | None] = ContextVar("finemesh_deadline", default=None)


def remaining_s() -> float | None:
    """Seconds that this call still has, never below zero; None when nothing limits it."""
    due = _due.get()
    return None if due is None else max(0.0, due - time.monotonic())


def set_remaining(seconds: float | None) -> None:
    """For the server, which runs each call in a task of its own."""
    _due.set(None if seconds is None else time.monotonic() + seconds)


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Calls made inside end within `seconds`, or sooner when the call being served must."""
    due, outer = time.monotonic() + seconds, _due.get()
    token = _due.set(due if outer is None else min(due, outer))
    try:
        yield
    finally:
        _due.reset(token)
