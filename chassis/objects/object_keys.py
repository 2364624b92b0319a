"""What may be the key of an object or the path of a file below a prefix: nothing that could leave its folder."""

import re
from typing import Protocol

from chassis.errors import invalid

KEY_CHARS_MAX = 1024
_SEGMENT = re.compile(r"[A-Za-z0-9._+=@~-]{1,255}")


class FileEntry(Protocol):
    """A file below a key prefix, as a manifest lists it; `path` is empty when the key is the whole name."""

    @property
    def path(self) -> str: ...

    @property
    def size_bytes(self) -> int: ...

    @property
    def sha256(self) -> str: ...


def checked_path(path: str) -> str:
    """`path` when it is relative, plain and stays where it is put; InvalidArgument otherwise."""
    segments = path.split("/")
    sound = len(path) <= KEY_CHARS_MAX and all(
        _SEGMENT.fullmatch(segment) and segment not in (".", "..") for segment in segments
    )
    if not sound:
        rule = "must be a relative path of plain names (letters, digits and ._+=@~-) without `..`"
        raise invalid("artifact.files.path", rule, message=f"{path[:200]!r} {rule}")
    return path


def key_of(prefix: str, file: FileEntry) -> str:
    """The whole key of `file` under an artifact's `prefix`, checked."""
    if not file.path:
        return checked_path(prefix)
    if not prefix.endswith("/"):
        rule = "must end in `/` for an artifact of several files"
        raise invalid("artifact.key", rule, message=f"the artifact key {rule}")
    return checked_path(prefix + file.path)
