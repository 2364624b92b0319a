"""An upload that outlived its removal, as in a process that was frozen, leaves no bytes that nobody knows."""

from collections.abc import AsyncIterator
from pathlib import Path
from unittest.mock import Mock

import pytest

from chassis.clock import SystemClock
from chassis.db.migrations import migrate
from chassis.db.pool import open_pool
from chassis.errors import Aborted
from chassis.ids import SeededIds
from chassis.objects.object_store import ObjectStore
from services.gateway.config import MIGRATIONS, GatewaySettings
from services.gateway.files.artifact_gc import ArtifactCollector
from services.gateway.files.upload_places import Uploader
from services.gateway.files.upload_stream import Announced
from services.gateway.files.uploads import NewFile, Uploads
from services.gateway.identity.domain import Organization, Project
from services.gateway.identity.store import IdentityStore
from services.gateway.requests.idempotency import Request

NOW = SystemClock().now()


async def test_bytes_that_come_after_their_removal_are_removed(database_url: str, tmp_path: Path) -> None:
    settings = GatewaySettings(database_url=database_url)
    pool = await open_pool(settings)
    await migrate(pool, [MIGRATIONS])
    async with pool.acquire() as connection:
        await IdentityStore(connection).add_organization(
            Organization(organization_id="o", display_name="", create_time=NOW)
        )
        project = Project(project_id="p", organization_id="o", slug="acme", display_name="", create_time=NOW)
        await IdentityStore(connection).add_project(project)
    store = ObjectStore(f"file://{tmp_path}", part_bytes=settings.upload_part_bytes, parts_in_flight_max=1)
    clock = SystemClock()
    collector = ArtifactCollector(pool, store, Mock(), clock, settings)
    uploads = Uploads(pool, store, collector, clock, SeededIds(1), settings)

    async def chunks() -> AsyncIterator[bytes]:
        yield b'{"messages": []}\n'
        # Another replica's sweep is through with it, while this process stood still.
        await pool.execute("DELETE FROM removals")

    request = Request(project_id="p", method="m", request_id="", fingerprint=bytes(32))
    new = NewFile(
        project_id="p",
        uploader=Uploader(organization_id="o", key_id="k"),
        display_name="",
        announced=Announced(size_bytes=0, sha256=""),
        request=request,
    )
    with pytest.raises(Aborted):
        await uploads.take(new, chunks())
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    await pool.close()
