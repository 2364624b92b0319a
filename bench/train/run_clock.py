"""What a run is measured by: wall and CPU seconds from its first step to its last, and the process's memory.
It knows no trainer."""

from __future__ import annotations

import resource
import time
from pathlib import Path

_PAGE_BYTES = resource.getpagesize()


class Clock:
    """`finish` may be called after every step: the last call counts."""

    def __init__(self) -> None:
        self._began_s = self._began_cpu_s = 0.0
        self._start_bytes = 0
        self._result: dict[str, float] = {}

    def start(self) -> None:
        self._start_bytes = held_bytes()
        self._began_s, self._began_cpu_s = time.perf_counter(), time.process_time()

    def finish(self) -> None:
        self._result = {
            "seconds": time.perf_counter() - self._began_s,
            # On a machine that is shared with others this is the steadier figure.
            "cpu_seconds": time.process_time() - self._began_cpu_s,
            "peak_bytes": peak_bytes(),
            "start_bytes": self._start_bytes,
        }

    def result(self) -> dict[str, float]:
        if not self._result:
            raise RuntimeError("no step was finished")
        return dict(self._result)


def peak_bytes() -> int:
    """The most that this process ever held; libraries and the model are part of it."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def held_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES
