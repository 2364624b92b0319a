"""Not pure: files. Folders of work under way, each held by a lock of the process that works there.

What no process holds was left by one that was killed. No time decides that, so no clock that is set takes a folder from
who works in it.
"""

import contextlib
import fcntl
import glob
import os
import shutil
from pathlib import Path


class HeldFolders:
    """Folders of `root` whose names begin with `prefix`. Any number of processes may share them."""

    def __init__(self, root: Path, *, prefix: str = "") -> None:
        self._root = root
        self._prefix = prefix

    def open(self, name: str) -> "HeldFolder":
        """Blocking. A new folder; a name is used once."""
        path = self._root / f"{self._prefix}{name}"
        while True:
            path.mkdir(mode=0o700, parents=True)
            held = lock_folder(path)
            if held is not None:
                return HeldFolder(path, held)
            # A sweep was faster than the lock, and takes the empty folder away.
            shutil.rmtree(path, ignore_errors=True)

    def sweep(self) -> list[str]:
        """Blocking. Removes what no process holds; returns the names."""
        removed = []
        for path in self._root.glob(f"{glob.escape(self._prefix)}*"):
            held = lock_folder(path) if path.is_dir() and not path.is_symlink() else None
            if held is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(held)
                removed.append(path.name)
        return removed


class HeldFolder:
    def __init__(self, path: Path, held: int) -> None:
        self.path = path
        self._held = held

    def close(self) -> None:
        """Blocking. Removes the folder unless it was renamed, and gives the lock back."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._held)


def lock_folder(path: Path, kind: int = fcntl.LOCK_EX) -> int | None:
    """A descriptor that locks the folder until it is closed; None when another lock forbids it, or the folder is gone.

    The lock is on the folder and not on its name: what was renamed meanwhile is not it any more.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        if os.path.samestat(os.stat(path), os.fstat(descriptor)):
            return descriptor
    os.close(descriptor)
    return None
