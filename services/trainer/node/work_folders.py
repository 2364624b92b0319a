"""Makes and removes the work folders of this node, one per attempt or analysis. Not pure: files.

A folder goes when its attempt ends, and all of them go when an agent starts. It knows where work lies, not what it
is. A lock keeps two agents of one node name from clearing each other's work.
"""

import fcntl
import os
import re
import shutil
from pathlib import Path

_PART = re.compile(r"[A-Za-z0-9_-]{1,128}")


class NodeFolder:
    """`root/<node name>/work/...`, held from `open` on by a lock."""

    def __init__(self, root: Path, node_name: str) -> None:
        self._folder = (root / node_name).absolute()
        self._work = self._folder / "work"
        self._lock: int | None = None

    def open(self) -> "NodeFolder":
        """Takes the lock, which ends with the process, then removes what an earlier incarnation left behind."""
        self._folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            message = f"another agent works in {self._folder}; give this one a node name of its own"
            raise RuntimeError(message) from error
        self._lock = lock
        shutil.rmtree(self._work, ignore_errors=True)
        self._work.mkdir(parents=True, exist_ok=True)
        return self

    def close(self) -> None:
        """Gives the lock back; for tests, where a process holds several folders one after the other."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def create(self, *parts: str) -> Path:
        """A fresh folder whose name is made of `parts`; parts that could leave the folder are refused."""
        for part in parts:
            if not _PART.fullmatch(part):
                raise ValueError(f"{part!r} cannot be part of a folder's name")
        folder = self._work / "-".join(parts)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder


def remove(folder: Path) -> None:
    """Blocking; whatever cannot be removed now goes when an agent starts next."""
    shutil.rmtree(folder, ignore_errors=True)
