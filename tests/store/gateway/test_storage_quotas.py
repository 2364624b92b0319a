"""What a project stores stays within its quota, however many uploads of however many replicas come at once."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import pytest_asyncio

from chassis.clock import SystemClock
from chassis.db.migrations import migrate
from chassis.db.pool import Pool, open_pool
from chassis.errors import ResourceExhausted
from chassis.ids import SystemIds
from chassis.objects.object_store import ObjectStore
from services.gateway.config import MIGRATIONS, GatewaySettings
from services.gateway.files.artifact_gc import ArtifactCollector
from services.gateway.files.domain import Storage
from services.gateway.files.reservation import Reservation, default_quota
from services.gateway.files.store import FileStore
from services.gateway.files.upload_places import Uploader
from services.gateway.files.upload_stream import Announced
from services.gateway.files.uploads import NewFile, Uploads
from services.gateway.identity.domain import Organization, Project
from services.gateway.identity.store import IdentityStore
from services.gateway.requests.idempotency import Request

MIB = 1024 * 1024
LINE = b'{"text": "x"}\n'
REQUEST = Request(project_id="p", method="m", request_id="", fingerprint=bytes(32))


@dataclass(kw_only=True)
class Quotas:
    """Two replicas over one database and one store."""

    pool: Pool
    settings: GatewaySettings
    replicas: list[Uploads]
    read_bytes: int = 0

    async def upload(self, size_bytes: int, *, replica: int = 0, announced: bool = True, key: str = "k") -> str:
        async def chunks() -> AsyncIterator[bytes]:
            self.read_bytes += size_bytes
            for start in range(0, size_bytes, MIB):
                # Each takes long enough for the others to come.
                await asyncio.sleep(0.01)
                part = min(MIB, size_bytes - start)
                yield (LINE * (part // len(LINE) + 1))[: part - 1] + b"\n"

        new = NewFile(
            project_id="p",
            uploader=Uploader(organization_id="o", key_id=key),
            display_name="",
            announced=Announced(size_bytes=size_bytes if announced else 0, sha256=""),
            request=REQUEST,
        )
        return await self.replicas[replica].take(new, chunks())

    async def stored(self) -> Storage:
        async with self.pool.acquire() as connection:
            storage = await FileStore(connection).storage("p", default_quota(self.settings))
        assert storage is not None
        return storage


@pytest_asyncio.fixture(loop_scope="session")
async def quotas(database_url: str, tmp_path: Path) -> AsyncIterator[Quotas]:
    settings = GatewaySettings(database_url=database_url, project_bytes_max=6 * MIB, upload_reserve_bytes=MIB)
    pool = await open_pool(settings)
    await migrate(pool, [MIGRATIONS])
    await pool.execute("TRUNCATE organizations, projects, api_keys, files, removals, idempotency, audit_log")
    clock = SystemClock()
    async with pool.acquire() as connection:
        store = IdentityStore(connection)
        now = clock.now()
        await store.add_organization(Organization(organization_id="o", display_name="", create_time=now))
        await store.add_project(
            Project(project_id="p", organization_id="o", slug="acme", display_name="", create_time=now)
        )
    artifacts = ObjectStore(f"file://{tmp_path}", part_bytes=settings.upload_part_bytes, parts_in_flight_max=1)
    collector = ArtifactCollector(pool, artifacts, Mock(), clock, settings)
    replicas = [Uploads(pool, artifacts, collector, clock, SystemIds(clock), settings) for _ in range(2)]
    yield Quotas(pool=pool, settings=settings, replicas=replicas)
    await pool.close()


@pytest.mark.parametrize("announced", [True, False])
async def test_uploads_at_once_at_two_replicas_never_exceed_the_bytes(quotas: Quotas, announced: bool):
    uploads = [
        quotas.upload(2 * MIB, replica=number % 2, announced=announced, key=f"k{number // 4}") for number in range(8)
    ]
    results = await asyncio.gather(*uploads, return_exceptions=True)
    kept = [result for result in results if isinstance(result, str)]
    refused = [result for result in results if isinstance(result, ResourceExhausted)]
    assert len(kept) + len(refused) == 8
    assert {error.reason for error in refused} == {"QUOTA_EXCEEDED"}
    assert {error.metadata["limit"] for error in refused} == {"project_bytes_max"}
    stored = await quotas.stored()
    # Those that announce nothing may all be refused in the middle; nothing that failed stays reserved.
    assert (stored.size_bytes, stored.file_count) == (len(kept) * 2 * MIB, len(kept))
    assert stored.size_bytes <= 6 * MIB
    if announced:
        assert len(kept) == 3
        # Who is refused by the size that was announced sent nothing.
        assert quotas.read_bytes == 6 * MIB
    assert await quotas.upload(6 * MIB - stored.size_bytes)


async def test_uploads_at_once_at_two_replicas_never_exceed_the_number_of_files(quotas: Quotas):
    async with quotas.pool.acquire() as connection:
        assert await FileStore(connection).set_quota("p", None, 5)
    uploads = [quotas.upload(100, replica=number % 2, key=f"k{number // 4}") for number in range(8)]
    results = await asyncio.gather(*uploads, return_exceptions=True)
    refused: list[Any] = [result for result in results if not isinstance(result, str)]
    assert [error.metadata["limit"] for error in refused] == ["project_files_max"] * 3
    assert (await quotas.stored()).file_count == 5


async def test_what_a_killed_process_reserved_is_free_when_its_time_is_over_by_the_database(quotas: Quotas):
    killed = Reservation(quotas.pool, "p", "files/p/killed", quotas.settings)
    await killed.begin(5 * MIB)
    with pytest.raises(ResourceExhausted, match=f"{MIB} are left"):
        await quotas.upload(2 * MIB)
    await quotas.pool.execute("UPDATE removals SET due_time = now()")
    assert await quotas.upload(2 * MIB)
    assert (await quotas.stored()).size_bytes == 2 * MIB
