"""The run's only voice: JSON objects, one a line, on the stream that the agent reads.

Types: ready, preparing, started, progress, evaluation, checkpoint, warning, exported, finished, stopped, failed; and reference, training
and evaluating, which only say that long work goes on. `progress` carries the metered range [start_step, end_step) and `evaluation` the
metered number; both keep their identity when work is redone.
It knows no lease and no meter.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from time import monotonic
from typing import Any, Protocol, TextIO

# The agent is gone; nobody reads why.
EXIT_ORPHANED = 4
SAY_EVERY_S = 60.0


class Emit(Protocol):
    def __call__(self, event_type: str, /, **fields: Any) -> None: ...


class EventStream:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._start = time.monotonic()

    def __call__(self, event_type: str, /, **fields: Any) -> None:
        event = {"type": event_type, "elapsed_s": round(time.monotonic() - self._start, 3), **fields}
        try:
            self._stream.write(json.dumps(event, allow_nan=False) + "\n")
            self._stream.flush()
        except BrokenPipeError:
            os._exit(EXIT_ORPHANED)

    def lend_stdout(self) -> None:
        """From here on processes that this one starts find the stream at their standard output, where they claim it."""
        os.dup2(self._stream.fileno(), 1)


def claim_stdout() -> EventStream:
    """Takes standard output for events alone: what libraries print goes to standard error from here on."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return EventStream(stream)


def sign_of_life(emit: Emit, event_type: str, total: int, done: int = 0) -> Callable[[int], None]:
    """To be called with how much more is done, of `total`; only now and then it says so."""
    said_s = monotonic()

    def tell(more: int) -> None:
        nonlocal done, said_s
        done += more
        if monotonic() - said_s >= SAY_EVERY_S:
            emit(event_type, done=min(done, total), total=total)
            said_s = monotonic()

    return tell
