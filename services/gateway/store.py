"""The gateway's tables as functions over a connection that return domain values. It decides nothing."""

from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from chassis.db.pool import Connection, Pool
from chassis.db.queries import affected, load_queries
from formats.row_errors import RowError
from services.gateway.domain import ApiKey, KeyHolder, Organization, Project, Repeated, StoredFile

QUERIES_FILE = Path(__file__).parent / "queries.sql"
MIGRATIONS = Path(__file__).parent / "migrations"


class KeyFinder:
    """What the authenticator asks: one key by the hash of its secret."""

    def __init__(self, pool: Pool, store: "Store") -> None:
        self._pool = pool
        self._store = store

    async def __call__(self, secret_sha256: bytes) -> KeyHolder | None:
        async with self._pool.acquire() as connection:
            return await self._store.find_key(connection, secret_sha256)


class Store:
    """One object per process; every method takes the connection, and with it the transaction."""

    def __init__(self) -> None:
        self._queries = load_queries(QUERIES_FILE)

    async def find_key(self, connection: Connection, secret_sha256: bytes) -> KeyHolder | None:
        row = await self._queries.find_key_by_secret(connection, secret_sha256=secret_sha256)
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

    async def organization(self, connection: Connection, organization_id: str) -> Organization | None:
        row = await self._queries.get_organization(connection, organization_id=organization_id)
        return None if row is None else Organization(**row)

    async def count_organizations(self, connection: Connection) -> int:
        return int(await self._queries.count_organizations(connection))

    async def lock_bootstrap(self, connection: Connection) -> None:
        await self._queries.lock_bootstrap(connection)

    async def add_organization(self, connection: Connection, organization: Organization) -> None:
        await self._queries.add_organization(connection, **asdict(organization))

    async def lock_organization(self, connection: Connection, organization_id: str) -> Organization | None:
        row = await self._queries.lock_organization(connection, organization_id=organization_id)
        return None if row is None else Organization(**row)

    async def project(self, connection: Connection, project_id: str, organization_id: str) -> Project | None:
        row = await self._queries.get_project(connection, project_id=project_id, organization_id=organization_id)
        return None if row is None else Project(**row)

    async def lock_project(self, connection: Connection, project_id: str, organization_id: str) -> Project | None:
        row = await self._queries.lock_project(connection, project_id=project_id, organization_id=organization_id)
        return None if row is None else Project(**row)

    async def project_by_slug(self, connection: Connection, slug: str) -> Project | None:
        row = await self._queries.find_project_by_slug(connection, slug=slug)
        return None if row is None else Project(**row)

    async def count_projects(self, connection: Connection, organization_id: str) -> int:
        return int(await self._queries.count_projects(connection, organization_id=organization_id))

    async def add_project(self, connection: Connection, project: Project) -> bool:
        """False when the slug is taken."""
        return affected(await self._queries.add_project(connection, **asdict(project))) == 1

    async def list_projects(
        self, connection: Connection, organization_id: str, after_id: str, limit: int
    ) -> list[Project]:
        rows = self._queries.list_projects(connection, organization_id=organization_id, after_id=after_id, limit=limit)
        return [Project(**row) async for row in rows]

    async def count_live_keys(self, connection: Connection, project_id: str) -> int:
        return int(await self._queries.count_live_keys(connection, project_id=project_id))

    async def add_key(self, connection: Connection, key: ApiKey, secret_sha256: bytes) -> None:
        await self._queries.add_key(
            connection,
            key_id=key.key_id,
            project_id=key.project_id,
            display_name=key.display_name,
            secret_sha256=secret_sha256,
            secret_prefix=key.secret_prefix,
            roles=list(key.roles),
            create_time=key.create_time,
        )

    async def key(self, connection: Connection, project_id: str, key_id: str) -> ApiKey | None:
        row = await self._queries.get_key(connection, project_id=project_id, key_id=key_id)
        return None if row is None else _key_of(row)

    async def list_keys(self, connection: Connection, project_id: str, before_id: str, limit: int) -> list[ApiKey]:
        rows = self._queries.list_keys(connection, project_id=project_id, before_id=before_id, limit=limit)
        return [_key_of(row) async for row in rows]

    async def revoke_key(self, connection: Connection, project_id: str, key_id: str, now: datetime) -> bool:
        """False when there was no valid key to revoke."""
        status = await self._queries.revoke_key(connection, project_id=project_id, key_id=key_id, revoke_time=now)
        return affected(status) == 1

    async def add_file(self, connection: Connection, file: StoredFile) -> None:
        values = {name: getattr(file, name) for name in StoredFile.__dataclass_fields__}
        await self._queries.add_file(connection, **{**values, "errors": [asdict(error) for error in file.errors]})

    async def file(self, connection: Connection, project_id: str, file_id: str) -> StoredFile | None:
        row = await self._queries.get_file(connection, project_id=project_id, file_id=file_id)
        return None if row is None else _file_of(row)

    async def list_files(self, connection: Connection, project_id: str, before_id: str, limit: int) -> list[StoredFile]:
        rows = self._queries.list_files(connection, project_id=project_id, before_id=before_id, limit=limit)
        return [_file_of(row) async for row in rows]

    async def delete_file(self, connection: Connection, project_id: str, file_id: str, now: datetime) -> bool:
        """False when there is no such file."""
        status = await self._queries.delete_file(connection, project_id=project_id, file_id=file_id, delete_time=now)
        return affected(status) == 1

    async def add_removal(self, connection: Connection, artifact_key: str, due: datetime) -> None:
        await self._queries.add_removal(connection, artifact_key=artifact_key, due_time=due)

    async def take_back_removal(self, connection: Connection, artifact_key: str) -> bool:
        """False when a sweep claimed the bytes, which may be gone."""
        return affected(await self._queries.take_back_removal(connection, artifact_key=artifact_key)) == 1

    async def claim_removal(self, connection: Connection, artifact_key: str, now: datetime) -> bool:
        """False when the bytes belong to a file now, or somebody else removes them."""
        return affected(await self._queries.claim_removal(connection, artifact_key=artifact_key, now=now)) == 1

    async def finish_removal(self, connection: Connection, artifact_key: str) -> None:
        await self._queries.finish_removal(connection, artifact_key=artifact_key)

    async def claim_removals(
        self, connection: Connection, *, now: datetime, claimed_before: datetime, limit: int
    ) -> list[str]:
        rows = self._queries.claim_removals(connection, now=now, claimed_before=claimed_before, limit=limit)
        return [row["artifact_key"] async for row in rows]

    async def claim_request(
        self,
        connection: Connection,
        *,
        project_id: str,
        method: str,
        request_id: str,
        fingerprint: bytes,
        resource_id: str,
        now: datetime,
    ) -> bool:
        """False when the request_id was used before, or a moment ago by a transaction that committed first."""
        status = await self._queries.add_idempotency(
            connection,
            project_id=project_id,
            method=method,
            request_id=request_id,
            fingerprint=fingerprint,
            resource_id=resource_id,
            create_time=now,
        )
        return affected(status) == 1

    async def repeated(self, connection: Connection, project_id: str, method: str, request_id: str) -> Repeated | None:
        row = await self._queries.get_idempotency(
            connection, project_id=project_id, method=method, request_id=request_id
        )
        if row is None:
            return None
        return Repeated(fingerprint=bytes(row["fingerprint"]), resource_id=row["resource_id"])

    async def prune_requests(self, connection: Connection, before: datetime, limit: int) -> None:
        await self._queries.prune_idempotency(connection, before=before, limit=limit)

    async def add_audit_entry(
        self,
        connection: Connection,
        *,
        now: datetime,
        organization_id: str,
        project_id: str,
        actor: str,
        action: str,
        resource: str,
        trace_id: str,
    ) -> None:
        await self._queries.add_audit_entry(
            connection,
            create_time=now,
            organization_id=organization_id,
            project_id=project_id,
            actor=actor,
            action=action,
            resource=resource,
            trace_id=trace_id,
        )


def _key_of(row: Any) -> ApiKey:
    return ApiKey(**{**row, "roles": tuple(row["roles"])})


def _file_of(row: Any) -> StoredFile:
    errors = tuple(RowError(**error) for error in row["errors"])
    return StoredFile(**{**row, "errors": errors, "features": tuple(row["features"])})
