"""Organizations, projects and keys as plain values."""

import re
from dataclasses import dataclass
from datetime import datetime

# Each role includes those before it: an admin is a member, an operator is both.
ROLES = ("member", "admin", "operator")
SLUG = re.compile(r"[a-z0-9][a-z0-9-]{1,38}[a-z0-9]")
# Base models live under it; a tenant's models must not look like them.
RESERVED_SLUGS = frozenset({"finemesh"})


@dataclass(frozen=True, kw_only=True)
class Organization:
    """Whom bills go to; it has projects."""

    organization_id: str
    display_name: str
    create_time: datetime


@dataclass(frozen=True, kw_only=True)
class Project:
    """What keys, files and jobs belong to; `slug` is the namespace of its models."""

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


def roles_up_to(wanted: frozenset[str]) -> tuple[str, ...]:
    """All roles that the highest of `wanted` includes; at least `member`."""
    highest = max((ROLES.index(role) for role in wanted), default=0)
    return ROLES[: highest + 1]
