"""The asyncpg pool of a process and the one way to open a transaction.

It refuses to know any table. The role in `database_url` decides the schema (its search_path), so no query names one.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeAlias

import asyncpg
import structlog

from chassis.backoff import Backoff
from chassis.db.bounded_pool import BoundedPool, PoolExhausted
from chassis.db.text import json_to_text, text_to_bytes
from chassis.db.text_connection import TextConnection
from chassis.settings import ChassisSettings

Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"
Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record] | asyncpg.pool.PoolConnectionProxy[asyncpg.Record]"

# What PostgreSQL and its client say when the database is away, restarting, stalled, out of slots or memory, read-only
# after a failover, or chose us as the victim of a deadlock.
_TROUBLES: tuple[type[Exception], ...] = (
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    # Shutdowns, and statements that ran into their timeout: a stalled disk makes even a good statement slow.
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.TransactionRollbackError,
    asyncpg.LockNotAvailableError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.TransactionTimeoutError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.PostgresIOError,
)

# As asyncpg has them: a connection is replaced after that many queries, and closed after that long without any.
CONNECTION_QUERIES_MAX = 50_000
CONNECTION_IDLE_S_MAX = 300.0
# A client whose machine vanished is given up by the server's kernel after so many probes without an answer.
PROBES_MAX = 3

_log = structlog.get_logger(__name__)


async def open_pool(settings: ChassisSettings) -> Pool:
    """Connects, waiting up to `startup_wait_s` for a database that is still starting; then raises what it met last."""
    deadline = asyncio.get_running_loop().time() + settings.startup_wait_s
    backoff = Backoff(first_s=settings.reconnect_backoff_s_min, last_s=settings.reconnect_backoff_s_max)
    while True:
        try:
            return await _create_pool(settings)
        except Exception as error:
            if not database_is_away(error):
                raise
            delay_s = backoff.next_s()
            if asyncio.get_running_loop().time() + delay_s > deadline:
                raise
            _log.warning("database_not_ready", error=repr(error), retry_in_s=delay_s)
            await asyncio.sleep(delay_s)


@asynccontextmanager
async def transaction(pool: Pool) -> AsyncIterator[Connection]:
    """One connection inside one transaction: commits at the end, rolls back on any exception.

    Keep it short and free of network calls: whoever waits inside holds locks that others wait for.
    """
    async with pool.acquire() as connection, connection.transaction():
        yield connection


def database_is_away(error: Exception) -> bool:
    """True when the error says nothing about the work itself: the same work, tried again, can succeed.

    Loops and consumers try again, and calls are answered as unavailable.
    """
    return isinstance(error, OSError | TimeoutError | PoolExhausted) or database_is_in_trouble(error)


def database_is_in_trouble(error: BaseException) -> bool:
    """The same of what only a database says: a wrong value or a wrong statement is not that."""
    if isinstance(error, asyncpg.DataError):
        return False
    if isinstance(error, asyncpg.InterfaceError):
        # asyncpg has one class for a closed connection or pool, for one that its pool took back because it died between
        # two statements, and for a call with wrong arguments.
        return "clos" in str(error) or "released back to the pool" in str(error)
    return isinstance(error, _TROUBLES)


def value_is_refused(error: BaseException) -> bool:
    """True when a value can be in no row, whoever writes it and when: out of a type's range or against a constraint of
    its table alone. A key that is taken or missing is not that: another row may come or go.
    """
    return isinstance(error, asyncpg.DataError | asyncpg.CheckViolationError | asyncpg.NotNullViolationError)


def database_is_full(error: BaseException) -> bool:
    """Its disk has no room for what a statement writes. One that also has none for its log stops, and is away."""
    return isinstance(error, asyncpg.DiskFullError)


async def _create_pool(settings: ChassisSettings) -> Pool:
    statement_timeout_ms = int(settings.statement_timeout_s * 1000)
    probe_s = max(1, round(settings.keepalive_s))
    pool = BoundedPool(
        settings.database_url,
        wait_s_max=settings.pool_wait_s_max,
        loop=None,
        connection_class=TextConnection,
        record_class=asyncpg.Record,
        max_queries=CONNECTION_QUERIES_MAX,
        max_inactive_connection_lifetime=CONNECTION_IDLE_S_MAX,
        min_size=min(settings.pool_size_min, settings.pool_size_max),
        max_size=settings.pool_size_max,
        timeout=settings.connect_timeout_s,
        # The server cancels first; the client's own limit only covers a server that went silent.
        command_timeout=settings.statement_timeout_s + settings.connect_timeout_s,
        init=_prepare_connection,
        reset=_keep_session,
        server_settings={
            "application_name": settings.service_name,
            "statement_timeout": str(statement_timeout_ms),
            # A transaction that was forgotten, or left open by a frozen process, must not hold row locks for ever.
            "idle_in_transaction_session_timeout": str(int(settings.transaction_idle_s_max * 1000)),
            # One whose client froze or vanished in the middle of what it sent is neither idle nor in a statement to the
            # server: this ends it.
            "transaction_timeout": str(int(settings.transaction_s_max * 1000)),
            # The kernel can tell a client that vanished, and sooner.
            "tcp_keepalives_idle": str(probe_s),
            "tcp_keepalives_interval": str(probe_s),
            "tcp_keepalives_count": str(PROBES_MAX),
            "timezone": "UTC",
        },
    )
    await pool
    return pool


async def _keep_session(connection: object) -> None:
    """Instead of asyncpg's own `RESET ALL` and the like, a round trip after each use: nothing here leaves session state
    behind (migrations clean up after themselves), and a transaction left open is still rolled back by asyncpg."""


async def _prepare_connection(connection: Connection) -> None:
    for name in ("json", "jsonb"):
        await connection.set_type_codec(name, schema="pg_catalog", encoder=json_to_text, decoder=json.loads)
    await connection.set_type_codec(
        "text", schema="pg_catalog", encoder=text_to_bytes, decoder=bytes.decode, format="binary"
    )
