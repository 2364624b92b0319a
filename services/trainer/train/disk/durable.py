"""Folders that exist whole or not at all. Not pure: disk.

A folder is written beside its final place, synced, described by a manifest with digests, and then renamed. It knows no
tensors.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from formats.manifests import MANIFEST, FileDigest, read_manifest, write_manifest

UNFINISHED_PREFIX = "tmp-"
# No room on the device, beyond the quota, beyond the size that this process may write.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFull(OSError):
    """A folder could not be written for want of room; what was there before is untouched."""

    def __init__(self, name: str) -> None:
        super().__init__(errno.ENOSPC, os.strerror(errno.ENOSPC), name)


def commit_folder(target: Path, write: Callable[[Path], None], manifest: dict[str, Any] | None) -> list[FileDigest]:
    """Calls `write` with an empty folder beside `target` and renames it there once every byte is on disk.

    With a manifest, manifest.json gets its fields and the list of files. An older `target` is replaced.
    """
    unfinished = unfinished_path(target)
    remove_folder(unfinished)
    try:
        files = _fill(unfinished, write, manifest)
    except Exception as error:
        # What is half there may be what fills the disk.
        shutil.rmtree(unfinished, ignore_errors=True)
        if is_disk_full(error):
            raise DiskFull(target.name) from error
        raise
    remove_folder(target)
    unfinished.rename(target)
    _sync(target.parent)
    return files


def unfinished_path(target: Path) -> Path:
    """Where the files lie before they are committed to `target`."""
    return target.parent / f"{UNFINISHED_PREFIX}{target.name}"


def _fill(unfinished: Path, write: Callable[[Path], None], manifest: dict[str, Any] | None) -> list[FileDigest]:
    unfinished.mkdir(parents=True)
    write(unfinished)
    files = digest_files(unfinished)
    if manifest is not None:
        (unfinished / MANIFEST).write_text(write_manifest(manifest, files), encoding="utf-8")
    for path in sorted(unfinished.rglob("*")):
        _sync(path)
    _sync(unfinished)
    return files


def is_disk_full(error: BaseException) -> bool:
    """Whether the error is a lack of room. Libraries that write by themselves wrap the system's error and leave its
    number in the text."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    return any(f"(os error {number})" in str(error) for number in _FULL)


def digest_files(folder: Path) -> list[FileDigest]:
    """Every file below `folder` but the manifest, sorted by path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return [
        FileDigest(path=path.relative_to(folder).as_posix(), size_bytes=path.stat().st_size, sha256=sha256_file(path))
        for path in paths
    ]


def read_whole_folder(folder: Path) -> dict[str, Any]:
    """The manifest of a folder whose files all match it. Raises ValueError saying what is wrong."""
    try:
        return read_manifest((folder / MANIFEST).read_bytes(), digest_files(folder))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder.name}: {error}") from error


def remove_unfinished(parent: Path) -> list[str]:
    """Clears what a killed writer left, folders and single files; returns the names."""
    torn = sorted(path.name for path in parent.glob(f"{UNFINISHED_PREFIX}*"))
    for name in torn:
        if (parent / name).is_dir():
            remove_folder(parent / name)
        else:
            (parent / name).unlink()
    return torn


def remove_folder(folder: Path) -> None:
    """Removes a folder if it is there. A finished one is first renamed away, so that a kill leaves no half of it."""
    if not folder.exists():
        return
    if not folder.name.startswith(UNFINISHED_PREFIX):
        doomed = folder.parent / f"{UNFINISHED_PREFIX}removed-{folder.name}"
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        folder = doomed
    shutil.rmtree(folder)


def sha256_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
