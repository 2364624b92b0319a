"""Reads and writes organizations, projects and keys. It decides nothing."""

from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from chassis.db.pool import Connection, Pool
from chassis.db.queries import affected, load_queries
from services.gateway.identity.domain import ApiKey, KeyHolder, Organization, Project

QUERIES = load_queries(Path(__file__).parent / "queries.sql")


class IdentityStore:
    """Organizations, projects and keys over one connection, inside the caller's transaction if there is one."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def find_key(self, secret_sha256: bytes) -> KeyHolder | None:
        row = await QUERIES.find_key_by_secret(self._connection, secret_sha256=secret_sha256)
        if row is None:
            return None
        return KeyHolder(
            key_id=row["key_id"],
            project_id=row["project_id"],
            organization_id=row["organization_id"],
            slug=row["slug"],
            roles=frozenset(row["roles"]),
            secret_sha256=bytes(row["secret_sha256"]),
            revoked=row["revoke_time"] is not None,
        )

    async def list_revoked(self, key_ids: list[str]) -> list[str]:
        return [row["key_id"] async for row in QUERIES.list_revoked(self._connection, key_ids=key_ids)]

    async def organization(self, organization_id: str) -> Organization | None:
        row = await QUERIES.get_organization(self._connection, organization_id=organization_id)
        return None if row is None else Organization(**row)

    async def count_organizations(self) -> int:
        return int(await QUERIES.count_organizations(self._connection))

    async def lock_bootstrap(self) -> None:
        await QUERIES.lock_bootstrap(self._connection)

    async def add_organization(self, organization: Organization) -> None:
        await QUERIES.add_organization(self._connection, **asdict(organization))

    async def lock_organization(self, organization_id: str) -> Organization | None:
        row = await QUERIES.lock_organization(self._connection, organization_id=organization_id)
        return None if row is None else Organization(**row)

    async def project(self, project_id: str, organization_id: str) -> Project | None:
        row = await QUERIES.get_project(self._connection, project_id=project_id, organization_id=organization_id)
        return None if row is None else Project(**row)

    async def lock_project(self, project_id: str, organization_id: str) -> Project | None:
        row = await QUERIES.lock_project(self._connection, project_id=project_id, organization_id=organization_id)
        return None if row is None else Project(**row)

    async def project_by_slug(self, slug: str) -> Project | None:
        row = await QUERIES.find_project_by_slug(self._connection, slug=slug)
        return None if row is None else Project(**row)

    async def count_projects(self, organization_id: str) -> int:
        return int(await QUERIES.count_projects(self._connection, organization_id=organization_id))

    async def add_project(self, project: Project, *, namespace_told: bool = False) -> bool:
        """False when the slug is taken."""
        status = await QUERIES.add_project(self._connection, **asdict(project), namespace_told=namespace_told)
        return affected(status) == 1

    async def untold_slugs(self, limit: int) -> list[str]:
        """Slugs that inference does not know yet as namespaces of projects."""
        return [row["slug"] async for row in QUERIES.list_untold_slugs(self._connection, limit=limit)]

    async def mark_told(self, slug: str) -> None:
        await QUERIES.mark_told(self._connection, slug=slug)

    async def list_projects(self, organization_id: str, after_id: str, limit: int) -> list[Project]:
        rows = QUERIES.list_projects(self._connection, organization_id=organization_id, after_id=after_id, limit=limit)
        return [Project(**row) async for row in rows]

    async def count_live_keys(self, project_id: str) -> int:
        return int(await QUERIES.count_live_keys(self._connection, project_id=project_id))

    async def add_key(self, key: ApiKey, secret_sha256: bytes) -> None:
        await QUERIES.add_key(
            self._connection,
            key_id=key.key_id,
            project_id=key.project_id,
            display_name=key.display_name,
            secret_sha256=secret_sha256,
            secret_prefix=key.secret_prefix,
            roles=list(key.roles),
            create_time=key.create_time,
        )

    async def key(self, project_id: str, key_id: str) -> ApiKey | None:
        row = await QUERIES.get_key(self._connection, project_id=project_id, key_id=key_id)
        return None if row is None else _key_of(row)

    async def list_keys(self, project_id: str, before_id: str, limit: int) -> list[ApiKey]:
        rows = QUERIES.list_keys(self._connection, project_id=project_id, before_id=before_id, limit=limit)
        return [_key_of(row) async for row in rows]

    async def revoke_key(self, project_id: str, key_id: str, now: datetime) -> bool:
        """False when there was no valid key to revoke."""
        status = await QUERIES.revoke_key(self._connection, project_id=project_id, key_id=key_id, revoke_time=now)
        return affected(status) == 1


class KeyFinder:
    """What the authenticator asks: one key by the hash of its secret; and what the key watch does."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def __call__(self, secret_sha256: bytes) -> KeyHolder | None:
        async with self._pool.acquire() as connection:
            return await IdentityStore(connection).find_key(secret_sha256)

    async def revoked(self, key_ids: list[str]) -> list[str]:
        async with self._pool.acquire() as connection:
            return await IdentityStore(connection).list_revoked(key_ids)


def _key_of(row: Any) -> ApiKey:
    return ApiKey(**{**row, "roles": tuple(row["roles"])})
