"""Applies numbered SQL files, once each, in order, in the schema of the connecting role.

It refuses to guess: a changed, missing or out-of-order file stops the process instead of being worked around.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from chassis.db.pool import Connection, Pool

CHASSIS_MIGRATIONS = Path(__file__).parent / "migrations"

# What the pool bounds, and a migration may exceed.
_LIMITS = ("statement_timeout", "idle_in_transaction_session_timeout", "transaction_timeout")
_FILE_NAME = re.compile(r"\d{4}_[a-z0-9_]+\.sql")
_log = structlog.get_logger(__name__)

_CREATE_TABLE = """
CREATE TABLE IF NOT EXISTS schema_migrations (
    filename text PRIMARY KEY,
    sha256 text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
)
"""


class MigrationError(Exception):
    """The files and what the database remembers of them do not agree; only a person can decide what is right."""


@dataclass(frozen=True, kw_only=True)
class MigrationFile:
    """`filename` is `<scope>/<NNNN_name.sql>`; the scope keeps the chassis's files apart from the service's."""

    filename: str
    sql: str

    @property
    def scope(self) -> str:
        return self.filename.split("/", 1)[0]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.sql.encode()).hexdigest()


async def migrate(pool: Pool, dirs: Sequence[Path]) -> list[str]:
    """Brings the schema up to date, the chassis's own folder first; returns the names of the files it applied.

    Any number of processes may call this at once: they queue on an advisory lock that belongs to the schema.
    """
    files = [file for folder in (CHASSIS_MIGRATIONS, *dirs) for file in read_folder(folder)]
    async with pool.acquire() as connection:
        # Waiting for another process's migration, or a long one of our own, must not hit the statement timeout.
        await connection.execute("; ".join(f"SET {limit} = 0" for limit in _LIMITS))
        await connection.execute("SELECT pg_advisory_lock(hashtext('migrations'), hashtext(current_schema()))")
        try:
            return await _apply_missing(connection, files)
        finally:
            await connection.execute("SELECT pg_advisory_unlock(hashtext('migrations'), hashtext(current_schema()))")
            await connection.execute("; ".join(f"RESET {limit}" for limit in _LIMITS))


def read_folder(folder: Path) -> list[MigrationFile]:
    """The files of one folder in order. The scope is the folder's parent: `services/billing/migrations` ->
    `billing`."""
    scope = folder.parent.name if folder.name == "migrations" else folder.name
    files = []
    numbers: set[str] = set()
    for path in sorted(folder.glob("*.sql")):
        if not _FILE_NAME.fullmatch(path.name):
            raise MigrationError(f"{path.name} in {folder} is not named NNNN_name.sql")
        if path.name[:4] in numbers:
            raise MigrationError(f"two files in {folder} have the number {path.name[:4]}")
        numbers.add(path.name[:4])
        files.append(MigrationFile(filename=f"{scope}/{path.name}", sql=path.read_text(encoding="utf-8")))
    if not files:
        raise MigrationError(f"no migrations in {folder}")
    return files


def missing(files: Sequence[MigrationFile], applied: Mapping[str, str]) -> list[MigrationFile]:
    """What is left to apply, given filename -> sha256 of what was; raises MigrationError when the two disagree."""
    by_name = {file.filename: file for file in files}
    scopes = {file.scope for file in files}
    newest: dict[str, str] = {}
    for filename, sha256 in applied.items():
        scope = filename.split("/", 1)[0]
        if scope not in scopes:
            continue
        if filename not in by_name:
            raise MigrationError(f"{filename} was applied to this database but the file is gone")
        if by_name[filename].sha256 != sha256:
            raise MigrationError(f"{filename} changed after it was applied; write a new migration instead")
        newest[scope] = max(newest.get(scope, ""), filename)
    left = [file for file in files if file.filename not in applied]
    for file in left:
        if file.filename < newest.get(file.scope, ""):
            raise MigrationError(f"{file.filename} is older than {newest[file.scope]}, which was applied already")
    return left


async def _apply_missing(connection: Connection, files: Sequence[MigrationFile]) -> list[str]:
    await connection.execute(_CREATE_TABLE)
    rows = await connection.fetch("SELECT filename, sha256 FROM schema_migrations")
    left = missing(files, {row["filename"]: row["sha256"] for row in rows})
    for file in left:
        async with connection.transaction():
            await connection.execute(file.sql)
            await connection.execute(
                "INSERT INTO schema_migrations (filename, sha256) VALUES ($1, $2)", file.filename, file.sha256
            )
        _log.info("migration_applied", filename=file.filename)
    return [file.filename for file in left]
