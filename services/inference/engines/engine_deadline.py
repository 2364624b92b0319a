"""Until when an engine may compute, as its own process and its computing process see it. Not pure: files, clock.

The devices of an engine are its own as long as their lease is renewed. When nobody can say any more that they are, the
engine ends by itself, also while the process that started it is frozen. It knows no lease and no device.
"""

from __future__ import annotations

import math
import mmap
import struct
import time
from pathlib import Path

_FORM = struct.Struct("<d")


class Deadline:
    """A moment of the machine's monotonic clock, which all its processes share. One that has passed stays passed."""

    def __init__(self) -> None:
        self._until_s = math.inf
        self._page: mmap.mmap | None = None

    @property
    def passed(self) -> bool:
        return time.monotonic() > self._until_s

    def set(self, until_s: float) -> None:
        """It only moves on, and never once it has passed: by then the engine may have ended."""
        if not self.passed and (until_s > self._until_s or math.isinf(self._until_s)):
            self._until_s = until_s
            if self._page is not None:
                self._page[: _FORM.size] = _FORM.pack(until_s)

    def share(self, path: Path) -> Path:
        """A file that shows the moment to other processes; it may be deleted while they read it."""
        path.write_bytes(_FORM.pack(self._until_s))
        with path.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), _FORM.size)
        return path


class SharedDeadline:
    """The moment as another process reads it, without asking the one that sets it."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._page = mmap.mmap(file.fileno(), _FORM.size, access=mmap.ACCESS_READ)

    @property
    def passed(self) -> bool:
        (until_s,) = _FORM.unpack(self._page[: _FORM.size])
        return time.monotonic() > float(until_s)
