"""Every query of the gateway against its real schema, and what the schema itself refuses."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from chassis.db.migrations import migrate
from chassis.db.pool import Pool, open_pool
from chassis.db.queries import statements
from formats.row_errors import RowError
from services.gateway.config import MIGRATIONS
from services.gateway.files.domain import StoredFile
from services.gateway.files.store import FileStore
from services.gateway.identity import keys
from services.gateway.identity.domain import ApiKey, Organization, Project
from services.gateway.identity.store import IdentityStore
from services.gateway.requests.store import RequestStore
from tests.harness.fixtures import SettingsFactory

ROOT = Path(__file__).parents[3]
NOW = datetime(2030, 1, 1, tzinfo=UTC)
ORGANIZATION = Organization(organization_id="org_1", display_name="Acme", create_time=NOW)
PROJECT = Project(project_id="proj_1", organization_id="org_1", slug="acme", display_name="Acme", create_time=NOW)
SECRET = keys.new_secret()
KEY = ApiKey(
    key_id="key_1",
    project_id="proj_1",
    display_name="first",
    secret_prefix=keys.shown_prefix(SECRET),
    roles=("member", "admin"),
    create_time=NOW,
    revoke_time=None,
)
FILE = StoredFile(
    file_id="file-1",
    project_id="proj_1",
    display_name="train",
    purpose="fine-tune",
    state="invalid",
    size_bytes=3,
    sha256="0" * 64,
    format=None,
    line_count=1,
    error_count=7,
    errors=(RowError(line=1, path="$", expectation="a JSON object", found='"übel\\ud800"'),),
    features=("reasoning", "tools"),
    create_time=NOW,
    work_bytes=256,
)


@pytest_asyncio.fixture(loop_scope="session")
async def pool(make_settings: SettingsFactory):
    pool = await open_pool(make_settings("gateway"))
    await migrate(pool, [MIGRATIONS])
    await pool.execute("TRUNCATE organizations, projects, api_keys, files, removals, idempotency, audit_log")
    yield pool
    await pool.close()


@pytest_asyncio.fixture(loop_scope="session")
async def connection(pool: Pool):
    async with pool.acquire() as connection:
        await IdentityStore(connection).add_organization(ORGANIZATION)
        await IdentityStore(connection).add_project(PROJECT)
        await IdentityStore(connection).add_key(KEY, keys.digest(SECRET))
        yield connection


def all_queries() -> list[tuple[str, str]]:
    """Name and SQL of the queries of every room."""
    found = []
    for file in sorted((ROOT / "services/gateway").rglob("queries.sql")):
        found += [(f"{file.parent.name}.{name}", sql) for name, sql in sorted(statements(file).items())]
    return found


@pytest.mark.parametrize(("name", "sql"), all_queries())
async def test_every_query_fits_the_schema(pool: Pool, name: str, sql: str):
    async with pool.acquire() as connection:
        await connection.prepare(sql)


async def test_migrating_twice_changes_nothing(pool: Pool):
    assert await migrate(pool, [MIGRATIONS]) == []


async def test_the_schema_is_the_documented_one(pool: Pool):
    rows = await pool.fetch(
        "SELECT table_name, string_agg(column_name, ' ' ORDER BY ordinal_position) AS columns"
        " FROM information_schema.columns WHERE table_schema = current_schema() GROUP BY table_name"
    )
    tables = {row["table_name"]: row["columns"] for row in rows}
    assert tables["organizations"] == "organization_id display_name create_time"
    assert tables["projects"] == (
        "project_id organization_id slug display_name create_time namespace_told stored_bytes_max stored_files_max"
    )
    assert tables["api_keys"] == (
        "key_id project_id display_name secret_sha256 secret_prefix roles create_time revoke_time"
    )
    assert tables["files"] == (
        "file_id project_id display_name purpose state size_bytes sha256 format line_count error_count errors"
        " create_time delete_time features work_bytes"
    )
    assert tables["removals"] == "artifact_key due_time claim_time project_id reserved_bytes"
    assert tables["idempotency"] == "project_id method request_id fingerprint resource_id create_time"
    assert tables["audit_log"] == (
        "entry_id create_time organization_id project_id actor action resource trace_id roles outcome"
    )


async def test_a_key_is_found_by_the_hash_of_its_secret(connection: Any):
    store = IdentityStore(connection)
    holder = await store.find_key(keys.digest(SECRET))
    assert holder is not None
    assert (holder.key_id, holder.project_id, holder.organization_id, holder.slug) == (
        "key_1",
        "proj_1",
        "org_1",
        "acme",
    )
    assert (holder.roles, holder.revoked) == (frozenset({"member", "admin"}), False)
    assert await store.revoke_key("proj_1", "key_1", NOW)
    assert not await store.revoke_key("proj_1", "key_1", NOW + timedelta(days=1))
    revoked = await store.key("proj_1", "key_1")
    assert revoked is not None
    assert revoked.revoke_time == NOW
    revoked_holder = await store.find_key(keys.digest(SECRET))
    assert revoked_holder is not None
    assert revoked_holder.revoked
    assert await store.find_key(keys.digest(keys.new_secret())) is None
    assert await store.count_live_keys("proj_1") == 0


async def test_a_file_comes_back_as_it_was_stored_until_it_is_deleted(connection: Any):
    store = FileStore(connection)
    await store.add(FILE)
    assert await store.file("proj_1", "file-1") == FILE
    assert await store.file("proj_2", "file-1") is None
    assert await store.list_files("proj_1", "", 10) == [FILE]
    assert not await store.delete("proj_2", "file-1", NOW)
    assert await store.delete("proj_1", "file-1", NOW)
    assert not await store.delete("proj_1", "file-1", NOW)
    assert await store.file("proj_1", "file-1") is None
    assert await store.list_files("proj_1", "", 10) == []


async def test_a_claimed_removal_cannot_be_taken_back(connection: Any):
    """All by the database's clock: no process's own clock lets bytes of an upload under way go."""
    store = FileStore(connection)

    async def claimed() -> list[str]:
        return [removal.artifact_key for removal in await store.claim_removals(claim_s=600, limit=10)]

    async def pass_time(interval: str) -> None:
        # In a test's one transaction now() stands still; what it wrote ages instead.
        await connection.execute(
            "UPDATE removals SET due_time = due_time - age, claim_time = claim_time - age"
            " FROM (SELECT $1::text::interval AS age)",
            interval,
        )

    for key in ("files/a", "files/b"):
        await store.add_removal(key, 3600)
    assert await claimed() == []
    assert await store.take_back_removal("files/a")
    await pass_time("59 min")
    assert await claimed() == []
    await pass_time("1 min")
    assert await claimed() == ["files/b"]
    assert not await store.take_back_removal("files/b")
    assert not await store.claim_removal("files/b")
    await pass_time("9 min")
    assert await claimed() == []
    await pass_time("2 min")
    assert await claimed() == ["files/b"]
    await store.finish_removal("files/b")
    assert await claimed() == []


async def test_a_request_id_is_claimed_once_and_forgotten_when_old(connection: Any):
    store = RequestStore(connection)
    claim: dict[str, Any] = {
        "project_id": "proj_1",
        "method": "Create",
        "request_id": "r",
        "fingerprint": bytes(32),
        "now": NOW,
    }
    assert await store.claim(resource_id="a", **claim)
    assert not await store.claim(resource_id="b", **claim)
    repeated = await store.repeated("proj_1", "Create", "r")
    assert repeated is not None
    assert (repeated.resource_id, repeated.fingerprint) == ("a", bytes(32))
    age_s = (datetime.now(UTC) - NOW).total_seconds()
    assert await store.prune(age_s + 60, 10) == 0
    assert await store.repeated("proj_1", "Create", "r") is not None
    assert await store.prune(age_s - 60, 10) == 1
    assert await store.repeated("proj_1", "Create", "r") is None


async def test_a_slug_is_taken_once(connection: Any):
    again = Project(project_id="proj_2", organization_id="org_1", slug="acme", display_name="", create_time=NOW)
    assert not await IdentityStore(connection).add_project(again)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE projects SET slug = 'Not A Slug'",
        "UPDATE api_keys SET roles = ARRAY['king']",
        "UPDATE api_keys SET roles = ARRAY[]::text[]",
        "UPDATE api_keys SET secret_sha256 = 'short'",
        "UPDATE api_keys SET project_id = 'proj_none'",
        "UPDATE files SET state = 'ready'",
        "UPDATE files SET size_bytes = -1",
        "UPDATE files SET sha256 = 'x'",
    ],
)
async def test_the_schema_refuses_what_must_not_be(connection: Any, statement: str):
    await FileStore(connection).add(FILE)
    with pytest.raises(asyncpg.IntegrityConstraintViolationError):
        await connection.execute(statement)
