"""A clock of the database that can be set: `now()` of every service's queries, as if somebody set the server's time.

Each role looks for functions in a schema of the storm before the server's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import asyncpg

from deploy.local.postgres import DATABASE, Postgres
from deploy.local.table import POSTGRES

if TYPE_CHECKING:
    from tests.storm.storm_mesh import StormMesh

_INSTALL = """
    CREATE SCHEMA storm;
    CREATE TABLE storm.clock (shift interval NOT NULL);
    INSERT INTO storm.clock VALUES ('0');
    CREATE FUNCTION storm.now() RETURNS timestamptz LANGUAGE sql STABLE
    AS 'SELECT pg_catalog.now() + (SELECT shift FROM storm.clock)';
    -- Who had a device when, in the order of the commits: times cannot tell it while clocks are set.
    CREATE TABLE storm.devices (
        sequence bigserial PRIMARY KEY, node text, device_index integer, lease_token bigint, live boolean
    );
    CREATE FUNCTION storm.note() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS '
    BEGIN
        INSERT INTO storm.devices (node, device_index, lease_token, live)
        VALUES (NEW.node, NEW.device_index, NEW.lease_token, NEW.released_at IS NULL);
        RETURN NULL;
    END';
    CREATE TRIGGER storm AFTER INSERT OR UPDATE ON scheduler.allocation_devices
    FOR EACH ROW EXECUTE FUNCTION storm.note();
"""


# Longer than statements and idle transactions of a storm may last.
OLD_S = 8.0
_OLD = """
    SELECT pid, usename, application_name, date_trunc('seconds', pg_catalog.now() - xact_start)::text AS age, state,
           wait_event_type, wait_event, pg_blocking_pids(pid) AS waits_for, left(query, 120) AS query
    FROM pg_stat_activity
    WHERE xact_start < pg_catalog.now() - make_interval(secs => $1) AND backend_type = 'client backend'
"""


async def install(mesh: StormMesh) -> None:
    """Once, when all tables are there; ends the connections that look for functions as before."""
    connection = await _superuser(mesh)
    try:
        await connection.execute(_INSTALL)
        roles = [row["rolname"] for row in await connection.fetch("SELECT rolname FROM pg_roles WHERE rolcanlogin")]
        for role in roles:
            if role != "postgres":
                await connection.execute(f"GRANT USAGE ON SCHEMA storm TO {role}")
                await connection.execute(f"GRANT SELECT ON storm.clock TO {role}")
                await connection.execute(f"ALTER ROLE {role} SET search_path = {role}, storm, pg_catalog")
        await connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND usename <> $1",
            "postgres",
        )
    finally:
        await connection.close()


async def shift(mesh: StormMesh, seconds: float) -> None:
    connection = await _superuser(mesh)
    try:
        await connection.execute("UPDATE storm.clock SET shift = make_interval(secs => $1)", seconds)
    finally:
        await connection.close()


async def device_history(mesh: StormMesh) -> list[asyncpg.Record]:
    connection = await _superuser(mesh)
    try:
        return list(await connection.fetch("SELECT * FROM storm.devices ORDER BY sequence"))
    finally:
        await connection.close()


async def old_transactions(mesh: StormMesh) -> list[asyncpg.Record]:
    """Transactions that last longer than any of the mesh does, whom they wait for, and what they wait in."""
    connection = await _superuser(mesh)
    try:
        return list(await connection.fetch(_OLD, OLD_S))
    finally:
        await connection.close()


async def _superuser(mesh: StormMesh) -> asyncpg.Connection:
    folder = mesh.stack.folder
    port = int(mesh.stack.addresses[POSTGRES].rpartition(":")[2])
    cluster = Postgres(folder=folder.postgres, port=port, password=folder.secrets([POSTGRES])[POSTGRES])
    return await asyncpg.connect(cluster.url(database=DATABASE))
