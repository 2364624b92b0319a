"""Keeps downloaded files by their SHA-256, for all agents of a machine. Not pure: files.

A base model is fetched once, not once per job. Files are hard-linked into the folders that use them,
so that removing a cached file never takes one from a running job. It knows digests only.
"""

import asyncio
import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from weakref import WeakValueDictionary

import structlog

from chassis.objects.held_folders import HeldFolders
from chassis.objects.object_keys import checked_path, key_of
from chassis.objects.transfer import FileTransfer, all_or_first_error
from formats.manifests import FileDigest

log = structlog.get_logger()

# Another agent may remove a file between our check and our link.
_LINK_TRIES = 3


class FileCache:
    """`folder/objects/ab/abcd...`. A file appears there by a rename, whole and verified, or not at all."""

    def __init__(self, folder: Path, store: FileTransfer, *, size_bytes_max: int, concurrent_max: int) -> None:
        self._objects = folder / "objects"
        self._partials = HeldFolders(folder / "partial")
        self._store = store
        self._size_bytes_max = size_bytes_max
        self._slots = asyncio.Semaphore(concurrent_max)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._objects.mkdir(parents=True, exist_ok=True)
        # What agents left that were killed; others of this machine may be fetching.
        self._partials.sweep()

    async def place(
        self, key: str, files: Sequence[FileDigest], folder: Path, *, wanted: Callable[[str], bool] = lambda path: True
    ) -> None:
        """The files of an artifact that are `wanted`, under `folder`; a single file keeps the last part of its key."""
        # A key that is refused is refused before any work is made.
        keys = [(key_of(key, file), file) for file in files if wanted(file.path)]
        works = [self._place(each, file, folder) for each, file in keys]
        await all_or_first_error(works)

    async def _place(self, key: str, file: FileDigest, folder: Path) -> None:
        target = folder / checked_path(file.path or key.rpartition("/")[2])
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = self._locks.setdefault(file.sha256, asyncio.Lock())
        for _ in range(_LINK_TRIES):
            async with lock, self._slots:
                cached = await self._cached(key, file)
            if await asyncio.to_thread(_link, cached, target):
                return
        raise FileNotFoundError(f"{cached} was removed again and again before it could be used")

    async def _cached(self, key: str, file: FileDigest) -> Path:
        cached = self._objects / file.sha256[:2] / file.sha256
        if cached.is_file() and cached.stat().st_size == file.size_bytes:
            os.utime(cached)
            return cached
        held = await asyncio.to_thread(self._partials.open, f"{file.sha256[:64]}.{secrets.token_hex(8)}")
        partial = held.path / "file"
        try:
            await self._store.download(key, file, partial)
            cached.parent.mkdir(parents=True, exist_ok=True)
            partial.chmod(0o444)
            partial.replace(cached)
        finally:
            await asyncio.to_thread(held.close)
        await asyncio.to_thread(self._make_room, cached)
        return cached

    def _make_room(self, newest: Path) -> None:
        """Removes the least recently used files above the limit, never the one that was just fetched."""
        found = []
        for path in self._objects.glob("*/*"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        excess_bytes = sum(size for _, size, _ in found) - self._size_bytes_max
        for _, size, path in sorted(found):
            if excess_bytes <= 0:
                return
            if path != newest:
                path.unlink(missing_ok=True)
                excess_bytes -= size
                log.info("cached_file_removed", file=path.name, size_bytes=size)


def _link(cached: Path, target: Path) -> bool:
    """False when the cached file is gone. Another file system gets a copy instead of a link."""
    target.unlink(missing_ok=True)
    try:
        target.hardlink_to(cached)
    except FileNotFoundError:
        return False
    except OSError:
        try:
            shutil.copyfile(cached, target)
        except FileNotFoundError:
            return False
    return True
