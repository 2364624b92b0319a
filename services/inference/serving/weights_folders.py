"""Folders of weights on a disk that processes share: which are in use, and which make room. Not pure: os, locks.

Who uses or fills a folder holds a lock on it through an open descriptor, so that a process that dies lets go. A folder
with its revision as its name is complete; one whose name begins with a dot is being filled or deleted. This module
knows no store and no model.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from chassis.errors import ResourceExhausted, Unavailable
from chassis.objects.held_folders import lock_folder

ROOM_WAIT_S_MAX = 30.0
_ROOM_PAUSE_S = 0.05
_RETRY_S = 5.0
log = structlog.get_logger()


def hold(folder: Path) -> int | None:
    """A descriptor that keeps a complete folder until it is closed; None when there is none, or one that is going."""
    descriptor = lock_folder(folder, fcntl.LOCK_SH)
    if descriptor is not None:
        touch(descriptor)
    return descriptor


def touch(descriptor: int) -> None:
    """Notes that the folder is used now, by which the longest unused one is found."""
    # The kernel's own time stands still for milliseconds.
    now_ns = time.time_ns()
    os.utime(descriptor, ns=(now_ns, now_ns))


def reserve(root: Path, revision: str, size_bytes: int, bytes_max: int) -> tuple[Path, int]:
    """An empty folder to fill, and the descriptor that keeps it. Room is made for it first, by the longest unused
    folders; ResourceExhausted when those that are not in use are not enough."""
    with _room(root):
        _make_room(root, size_bytes, bytes_max)
        # Its bytes count from now on, although they are not there yet.
        partial = root / f".{revision}-{uuid.uuid4().hex}-{size_bytes}"
        partial.mkdir()
        descriptor = lock_folder(partial, fcntl.LOCK_SH)
        assert descriptor is not None, "nobody else knows this folder"
        return partial, descriptor


def tidy(root: Path, bytes_max: int) -> None:
    """Deletes what dead processes left, and the longest unused folders beyond the limit."""
    with _room(root):
        _make_room(root, 0, bytes_max)


def publish(partial: Path, target: Path) -> None:
    """Gives the finished folder its name; another process may have been first with the same contents."""
    # Not while somebody counts, who would miss it under both names.
    with _room(partial.parent):
        try:
            partial.rename(target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise


def discard(partial: Path, descriptor: int) -> None:
    """Ends a reservation, with what is left of its folder."""
    shutil.rmtree(partial, ignore_errors=True)
    os.close(descriptor)


def _make_room(root: Path, size_bytes: int, bytes_max: int) -> None:
    taken = 0
    complete: list[tuple[float, Path, int]] = []
    for folder in root.iterdir():
        if not folder.is_dir():
            continue
        if not folder.name.startswith("."):
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            complete.append((folder.stat().st_mtime, folder, size))
            taken += size
        elif not _delete(folder):
            announced = folder.name.rpartition("-")[2]
            taken += int(announced) if announced.isdecimal() else 0
    for _, folder, size in sorted(complete):
        if taken + size_bytes <= bytes_max:
            return
        if _delete(folder):
            log.info("weights_evicted", revision=folder.name, size_bytes=size)
            taken -= size
    if size_bytes and taken + size_bytes > bytes_max:
        raise ResourceExhausted(
            "CAPACITY_EXHAUSTED",
            f"{size_bytes} bytes of weights do not fit beside {taken} that are in use (weights_cache_bytes_max,"
            f" {bytes_max})",
            metadata={"limit": "weights_cache_bytes_max", "limit_bytes": str(bytes_max)},
            retry_after_s=_RETRY_S,
        )


def _delete(folder: Path) -> bool:
    """False when somebody uses or fills it."""
    descriptor = lock_folder(folder)
    if descriptor is None:
        return not folder.exists()
    try:
        gone = folder.parent / f".{folder.name.lstrip('.')}-{uuid.uuid4().hex}-0"
        # Out of sight at once: a process that dies while it deletes must leave no half of a folder.
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
    finally:
        os.close(descriptor)
    return True


@contextmanager
def _room(root: Path) -> Iterator[None]:
    """One process at a time decides who makes room; Unavailable when it does not come to that in time."""
    root.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + ROOM_WAIT_S_MAX
    with (root / ".room").open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    message = f"another process has been making room in {root} for {ROOM_WAIT_S_MAX:g} s"
                    raise Unavailable("DEPENDENCY_UNAVAILABLE", message, retry_after_s=_RETRY_S) from None
                time.sleep(_ROOM_PAUSE_S)
        yield
