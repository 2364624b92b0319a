"""Ends a spawned Python child when its parent ends, even when the parent is killed. Not pure: os.

It refuses to know what the child computes.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
import time
from typing import Any

_POLL_S = 0.5


class DieWithParent(dict[str, Any]):
    """A dict that starts the watch when a spawned child unpickles it, which is before the child runs its target."""

    def __reduce__(self) -> tuple[Any, ...]:
        return watch_parent, (dict(self), os.getpid())


def watch_parent(content: dict[str, Any], parent_pid: int) -> dict[str, Any]:
    """Start the watch, unless this process is the parent itself (a copy was made there); gives `content` back."""
    if os.getpid() != parent_pid:
        # Tearing heavy imported libraries down takes seconds and frees nothing that the end of a process does not.
        atexit.register(os._exit, 0)
        threading.Thread(target=_end_with, args=(parent_pid,), name="parent-watch", daemon=True).start()
    return content


def _end_with(parent_pid: int) -> None:
    # The kernel gives an orphan another parent, however its own one ended.
    while os.getppid() == parent_pid:
        time.sleep(_POLL_S)
    os.kill(os.getpid(), signal.SIGKILL)
