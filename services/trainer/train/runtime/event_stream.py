"""The events of a run: JSON objects, one a line, for the agent. Not pure: standard output.

Types: ready, preparing, started, progress, evaluation, checkpoint, warning, exported, finished, stopped and failed.
reference, training and evaluating only say that long work goes on. `progress` carries the metered range [start_step,
end_step) and `evaluation` the metered number; both keep their identity when work is redone. It knows no lease and no
meter.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from time import monotonic
from typing import Any, Protocol, TextIO

# The exit code when the agent is gone.
EXIT_ORPHANED = 4
SIGN_OF_LIFE_S = 60.0


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
        """Puts the stream at standard output again, where processes that this one starts inherit and claim it."""
        os.dup2(self._stream.fileno(), 1)


def claim_stdout() -> EventStream:
    """Takes standard output for events alone. What libraries print goes to standard error from now on."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return EventStream(stream)


def sign_of_life(emit: Emit, event_type: str, total: int, done: int = 0) -> Callable[[int], None]:
    """Returns a function to call with the amount of work done since the last call, of `total`. It emits an event at
    most every SIGN_OF_LIFE_S, because a process that says nothing for hours is taken for hung."""
    emitted_s = monotonic()

    def report(more: int) -> None:
        nonlocal done, emitted_s
        done += more
        if monotonic() - emitted_s >= SIGN_OF_LIFE_S:
            emit(event_type, done=min(done, total), total=total)
            emitted_s = monotonic()

    return report
