"""What the gateway keeps: organizations, projects, keys and files as plain values. It knows no table and no protobuf."""

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from formats.row_errors import RowError
from formats.rows import Format

# Each role includes those before it: an admin is a member, an operator is both.
ROLES = ("member", "admin", "operator")
FileState = Literal["ready", "invalid"]
SLUG = re.compile(r"[a-z0-9][a-z0-9-]{1,38}[a-z0-9]")
# Base models live under it; a tenant's models must not look like them.
RESERVED_SLUGS = frozenset({"finemesh"})


@dataclass(frozen=True, kw_only=True)
class Organization:
    organization_id: str
    display_name: str
    create_time: datetime


@dataclass(frozen=True, kw_only=True)
class Project:
    project_id: str
    organization_id: str
    slug: str
    display_name: str
    create_time: datetime


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """Without its secret, which nobody has but its owner."""

    key_id: str
    project_id: str
    display_name: str
    secret_prefix: str
    roles: tuple[str, ...]
    create_time: datetime
    revoke_time: datetime | None


@dataclass(frozen=True, kw_only=True)
class KeyHolder:
    """Whom a secret speaks for."""

    key_id: str
    project_id: str
    organization_id: str
    slug: str
    roles: frozenset[str]
    secret_sha256: bytes
    revoked: bool


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """`sha256` is lower-case hex; `errors` are the first ones, `error_count` counts all;
    `features` are the names of those that the dataset uses, in alphabetical order."""

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


@dataclass(frozen=True, kw_only=True)
class Repeated:
    """What an earlier request with the same request_id was and made."""

    fingerprint: bytes
    resource_id: str


def roles_up_to(wanted: frozenset[str]) -> tuple[str, ...]:
    """All roles that the highest of `wanted` includes; at least `member`."""
    highest = max((ROLES.index(role) for role in wanted), default=0)
    return ROLES[: highest + 1]


def artifact_key(project_id: str, file_id: str) -> str:
    """Where a file's bytes lie in the artifact store."""
    return f"files/{project_id}/{file_id}"
