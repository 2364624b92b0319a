"""Organizations of tests: each with a project and a key of all roles, written as the gateway's bootstrap writes them.

The API makes no organization: that is an operator's deed.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import UTC, datetime

import asyncpg

from services.gateway.identity import keys
from services.gateway.identity.domain import ROLES


@dataclass(frozen=True, kw_only=True)
class Tenant:
    """An organization with its one project, and a key that may do everything there."""

    organization_id: str
    project_id: str
    key_id: str
    slug: str
    api_key: str


async def add_organization(gateway_database_url: str, slug: str) -> Tenant:
    """`slug` is new; the ids are random."""
    tail, now, secret = uuid.uuid4().hex, datetime.now(UTC), keys.new_secret()
    tenant = Tenant(
        organization_id=f"org_{tail}", project_id=f"proj_{tail}", key_id=f"key_{tail}", slug=slug, api_key=secret
    )
    connection = await asyncpg.connect(gateway_database_url)
    try:
        async with connection.transaction():
            await connection.execute(
                "INSERT INTO organizations (organization_id, display_name, create_time) VALUES ($1, $2, $3)",
                tenant.organization_id,
                slug,
                now,
            )
            await connection.execute(
                "INSERT INTO projects (project_id, organization_id, slug, display_name, create_time)"
                " VALUES ($1, $2, $3, $3, $4)",
                tenant.project_id,
                tenant.organization_id,
                slug,
                now,
            )
            await connection.execute(
                "INSERT INTO api_keys (key_id, project_id, display_name, secret_sha256, secret_prefix, roles,"
                " create_time) VALUES ($1, $2, $3, $4, $5, $6, $7)",
                tenant.key_id,
                tenant.project_id,
                slug,
                keys.digest(secret),
                keys.shown_prefix(secret),
                list(ROLES),
                now,
            )
    finally:
        await connection.close()
    return tenant
