"""An embedded PostgreSQL: its folder, its command line, its roles and schemas. It knows no table.

It listens on 127.0.0.1 only and every connection needs a password; there is no Unix socket. PostgreSQL refuses to run
as root, so a root launcher runs it as the system user `finemesh_pg`. That user needs no right on the folders above the
cluster, whose modes nobody changes: the server is started inside its folder and knows it by that alone.
"""

import asyncio
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from deploy.local.child import Command, launched
from deploy.local.ports import HOST
from deploy.local.postgres_programs import programs_for, system_user

DATABASE = "finemesh"
SUPERUSER = "postgres"
# Where a process stands, whoever may pass through the folders above it. Linux has it, and only there root starts it.
WORKING_FOLDER = "/proc/self/cwd"
CONNECTIONS_MAX = 200
POLL_S = 0.02


@dataclass(frozen=True, kw_only=True)
class Postgres:
    """`folder` holds the cluster and is made on first use; `password` is the superuser's."""

    folder: Path
    port: int
    password: str

    def url(self, *, role: str = SUPERUSER, password: str | None = None, database: str = "postgres") -> str:
        return f"postgresql://{role}:{password or self.password}@{HOST}:{self.port}/{database}"

    def command(self) -> Command:
        settings = {
            "port": str(self.port),
            "listen_addresses": HOST,
            "unix_socket_directories": "",
            "max_connections": str(CONNECTIONS_MAX),
            "log_min_messages": "warning",
        }
        user = system_user()
        return Command(
            name="postgres",
            arguments=(
                str(programs_for(user) / "postgres"),
                "-D",
                self._folder_as_seen_by(user),
                *(word for name, value in settings.items() for word in ("-c", f"{name}={value}")),
            ),
            folder=self.folder,
            user=user,
            stop_signal=signal.SIGINT,  # "fast": ends sessions instead of waiting for them
            death_signal=signal.SIGQUIT,  # "immediate": also ends the workers, at the price of a recovery
        )

    async def initialise(self) -> None:
        """Makes the cluster unless a complete one is there."""
        user = system_user()
        if await asyncio.to_thread(self._prepare_folder, user):
            return
        with self._password_file(user) as password_file:
            arguments = (
                str(programs_for(user) / "initdb"),
                f"--pgdata={self._folder_as_seen_by(user)}",
                f"--username={SUPERUSER}",
                f"--pwfile=/dev/fd/{password_file}",
                "--auth=scram-sha-256",
                "--encoding=UTF8",
                "--no-locale",
                "--no-instructions",
                # A machine that loses power during the very first start makes its cluster again.
                "--no-sync",
            )
            process = await asyncio.create_subprocess_exec(
                *launched(arguments, user=user, death_signal=signal.SIGKILL),
                cwd=self.folder,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                pass_fds=(password_file,),
            )
            said, _ = await _to_its_end(process)
        if process.returncode != 0:
            raise RuntimeError(f"initdb failed in {self.folder}:\n{said.decode(errors='replace')}")
        await asyncio.to_thread((self.folder / "complete").touch)

    async def wait_ready(self, timeout_s: float = 60) -> None:
        """Returns when the server answers a statement; raises what it met last after the timeout."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while True:
            try:
                connection = await asyncpg.connect(self.url(), timeout=timeout_s)
            except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                if asyncio.get_running_loop().time() > deadline:
                    raise
                await asyncio.sleep(POLL_S)
            else:
                await connection.close()
                return

    async def ensure_roles(self, passwords: Mapping[str, str]) -> None:
        """One database; in it a schema per role that only this role can enter and that its queries need not name."""
        server = await asyncpg.connect(self.url())
        try:
            if not await server.fetchval("SELECT 1 FROM pg_database WHERE datname = $1", DATABASE):
                await server.execute(f"CREATE DATABASE {DATABASE}")
        finally:
            await server.close()
        database = await asyncpg.connect(self.url(database=DATABASE))
        try:
            known = {row["rolname"] for row in await database.fetch("SELECT rolname FROM pg_roles")}
            for role, password in passwords.items():
                if role not in known:
                    await database.execute(role_statements(role, password))
        finally:
            await database.close()

    def _folder_as_seen_by(self, user: str | None) -> str:
        return str(self.folder) if user is None else WORKING_FOLDER

    def _prepare_folder(self, user: str | None) -> bool:
        """True when the cluster is complete. What an interrupted first start left is removed."""
        if (self.folder / "complete").exists():
            return True
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(mode=0o700, parents=True)
        if user is not None:
            shutil.chown(self.folder, user, user)
        return False

    @contextmanager
    def _password_file(self, user: str | None) -> Iterator[int]:
        """A private file known by its descriptor only: it has no name that somebody else could open."""
        with tempfile.TemporaryFile() as file:
            file.write(self.password.encode())
            file.seek(0)
            if user is not None:
                shutil.chown(file.fileno(), user, user)
            yield file.fileno()


async def _to_its_end(process: asyncio.subprocess.Process) -> tuple[bytes, bytes]:
    """What it said; a stop that comes in between ends it."""
    try:
        return await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()


def role_statements(role: str, password: str) -> str:
    """All or nothing, so that a role that exists has its schema too."""
    assert role.isidentifier()
    assert password.isalnum()
    return f"""
        BEGIN;
        CREATE ROLE {role} LOGIN PASSWORD '{password}';
        CREATE SCHEMA {role} AUTHORIZATION {role};
        ALTER ROLE {role} SET search_path = {role};
        REVOKE CREATE ON SCHEMA public FROM PUBLIC;
        COMMIT;
    """
