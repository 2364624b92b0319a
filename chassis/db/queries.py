"""Loads a `queries.sql` (aiosql) for asyncpg. It knows neither what the queries say nor who calls them.

In the file every query names its parameters, `-- name: get_job(project, job)^`, followed by one sentence of comment.
Suffix: `^` one row or None, `$` one value, `!` no rows (returns the status such as "UPDATE 1"), none = many rows, which
is an async generator: `async for row in queries.list_jobs(connection, project=...)`.
"""

from pathlib import Path
from typing import Any, TypeAlias

import aiosql

Queries: TypeAlias = Any


def load_queries(path: Path) -> Queries:
    """One object with a method per query: `await queries.get_job(connection, project=..., job=...)`."""
    return aiosql.from_path(path, "asyncpg")


def statements(path: Path) -> dict[str, str]:
    """Query name -> SQL with positional parameters, as asyncpg sends it; a test PREPAREs each against the schema."""
    queries = load_queries(path)
    # aiosql lists a `<name>_cursor` twin beside every query of many rows; the SQL is the same.
    return {name: getattr(queries, name).sql for name in queries.available_queries if not name.endswith("_cursor")}


def affected(status: str) -> int:
    """Number of rows in a command status of asyncpg: "UPDATE 3" -> 3, "INSERT 0 1" -> 1."""
    return int(status.rsplit(" ", 1)[-1])
