"""A real PostgreSQL and real nats-servers for tests, started by the code of the local stack."""

import itertools
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import asyncpg

from deploy.bus_users import OPERATOR, USERS
from deploy.local.broker import Broker
from deploy.local.child import Child, Command
from deploy.local.ports import PortClaims
from deploy.local.postgres import Postgres, role_statements
from deploy.local.process_output import Output

STOP_GRACE_S = 20.0
SECRET = "0123456789abcdef"
# What a killed server wrote is in the kernel's hands; only a machine that loses power would lose it. Each database that
# a test drops would wait for the disk otherwise.
UNSYNCED = ("-c", "fsync=off")


class Server:
    """A server process that a test may kill and start again on the same port and data."""

    def __init__(self, command: Command, logs: Path) -> None:
        self._command = command
        self._output = Output(command.name, logs, None)
        self._child: Child | None = None

    async def start(self) -> None:
        assert self._child is None
        self._child = await Child.start(self._command, self._output)

    async def kill(self) -> None:
        assert self._child is not None
        self._child.send(signal.SIGKILL)
        await self._child.wait()
        self._child = None

    async def stop(self) -> None:
        if self._child is not None:
            await self._child.stop(STOP_GRACE_S)
            self._child = None
        self._output.close()


class PostgresServer(Server):
    """`scratch` gives a new database with a role of its own, laid out as a service finds it."""

    def __init__(self, cluster: Postgres, logs: Path) -> None:
        command = cluster.command()
        super().__init__(replace(command, arguments=(*command.arguments, *UNSYNCED)), logs)
        self.cluster = cluster
        self._numbers = itertools.count(1)

    async def start(self) -> None:
        await super().start()
        await self.cluster.wait_ready()

    @asynccontextmanager
    async def scratch(self) -> AsyncIterator[str]:
        name = f"scratch_{next(self._numbers)}"
        await self._on("postgres", f"CREATE DATABASE {name}")
        await self._on(name, role_statements(name, SECRET))
        yield self.cluster.url(role=name, password=SECRET, database=name)
        await self._on("postgres", f"DROP DATABASE {name} WITH (FORCE)")
        await self._on("postgres", f"DROP ROLE {name}")

    async def _on(self, database: str, statement: str) -> None:
        try:
            connection = await asyncpg.connect(self.cluster.url(database=database))
        except OSError as error:
            raise AssertionError(f"PostgreSQL is gone; its last lines:\n{self._output.tail()}") from error
        try:
            await connection.execute(statement)
        finally:
            await connection.close()


class NatsServer(Server):
    def __init__(self, broker: Broker, logs: Path) -> None:
        super().__init__(broker.command(), logs)
        self.broker = broker
        # All rights: a test stands in for every service.
        self.url = broker.url(OPERATOR)

    async def start(self) -> None:
        await super().start()
        await self.broker.wait_ready()


@asynccontextmanager
async def running_postgres(folder: Path) -> AsyncIterator[PostgresServer]:
    claims = PortClaims()
    port = claims.pick(["postgres"], {})["postgres"]
    cluster = Postgres(folder=folder / "postgres", port=port, password=SECRET)
    await cluster.initialise()
    server = PostgresServer(cluster, folder)
    async with _running(server, claims):
        yield server


@asynccontextmanager
async def running_nats(folder: Path) -> AsyncIterator[NatsServer]:
    claims = PortClaims()
    server = NatsServer(
        Broker(folder=folder, port=claims.pick(["nats"], {})["nats"], passwords=dict.fromkeys(USERS, SECRET)), folder
    )
    async with _running(server, claims):
        yield server


@asynccontextmanager
async def _running(server: PostgresServer | NatsServer, claims: PortClaims) -> AsyncIterator[None]:
    await server.start()
    try:
        yield
    finally:
        await server.stop()
        claims.release()
