"""Ends a spawned Python child when its parent ends or its deadline passes. Not pure: os.

Also when the parent is killed, and while the parent is frozen. It refuses to know what the child computes.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from services.inference.engines.engine_deadline import SharedDeadline

_POLL_S = 0.2


class DieWithParent(dict[str, Any]):
    """A dict that starts the watch when a spawned child unpickles it, which is before the child runs its target."""

    def __init__(self, content: dict[str, Any], deadline: Path) -> None:
        super().__init__(content)
        self._deadline = deadline

    def __reduce__(self) -> tuple[Any, ...]:
        return watch_parent, (dict(self), os.getpid(), self._deadline)


def watch_parent(content: dict[str, Any], parent_pid: int, deadline: Path) -> dict[str, Any]:
    """Start the watch, unless this process is the parent itself (a copy was made there); gives `content` back."""
    if os.getpid() != parent_pid:
        # Tearing heavy imported libraries down takes seconds and frees nothing that the end of a process does not.
        atexit.register(os._exit, 0)
        watch = threading.Thread(target=_end_with, args=(parent_pid, deadline), name="parent-watch", daemon=True)
        watch.start()
    return content


def _end_with(parent_pid: int, path: Path) -> None:
    deadline = SharedDeadline(path)
    # The kernel gives an orphan another parent, however its own one ended.
    while os.getppid() == parent_pid and not deadline.passed:
        time.sleep(_POLL_S)
    os.kill(os.getpid(), signal.SIGKILL)
