"""Makes a spawned Python child die with its parent, even when the parent is killed and can say nothing.

It refuses to know what the child computes.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import wait
from typing import Any


class DieWithParent(dict[str, Any]):
    """A dict that starts the watch when a spawned child unpickles it, which is before the child runs its target."""

    def __reduce__(self) -> tuple[Any, ...]:
        return watch_parent, (dict(self),)


def watch_parent(content: dict[str, Any]) -> dict[str, Any]:
    """Start the watch where there is a parent to watch; gives `content` back."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), name="parent-watch", daemon=True).start()
        # Tearing heavy imported libraries down takes seconds and frees nothing that the end of a process does not.
        atexit.register(os._exit, 0)
    return content


def _end_with(sentinel: int) -> None:
    # The kernel closes the parent's end of this pipe however the parent ends.
    wait([sentinel])
    os.kill(os.getpid(), signal.SIGKILL)
