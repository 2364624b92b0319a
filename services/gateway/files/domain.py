"""An uploaded file as a plain value, and where its bytes lie."""

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from formats.row_errors import RowError
from formats.rows import Format

FileState = Literal["ready", "invalid"]


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """`sha256` is lower-case hex; `errors` are the first ones, `error_count` counts all.

    `features` are the names of those that the dataset uses, in alphabetical order. `work_bytes` is how much work
    reading it is; 0 where that is its size.
    """

    file_id: str
    project_id: str
    display_name: str
    purpose: Literal["fine-tune"]
    state: FileState
    size_bytes: int
    sha256: str
    format: Format | None
    line_count: int
    error_count: int
    errors: tuple[RowError, ...]
    features: tuple[str, ...]
    create_time: datetime
    work_bytes: int


@dataclass(frozen=True, kw_only=True)
class StorageQuota:
    size_bytes_max: int
    file_count_max: int


@dataclass(frozen=True, kw_only=True)
class Storage:
    """What a project stores, with what its uploads under way have reserved, and how much that may be."""

    size_bytes: int
    file_count: int
    size_bytes_max: int
    file_count_max: int


@dataclass(frozen=True, kw_only=True)
class DueRemoval:
    """Bytes that are to go; `was_file` when they were a file that jobs may still read."""

    artifact_key: str
    was_file: bool


def artifact_key(project_id: str, file_id: str) -> str:
    """Where a file's bytes lie in the artifact store."""
    return f"files/{project_id}/{file_id}"
