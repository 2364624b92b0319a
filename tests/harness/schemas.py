"""The tables of a service as they are, and as a page of docs/ lists them."""

import re
from pathlib import Path

from chassis.db.pool import Pool

CHASSIS_TABLES = ("outbox", "inbox", "handler_failures", "dead_letters", "streams", "schema_migrations")
_DOCUMENTED = re.compile(r"^(\w+)\((.+)\)$", re.MULTILINE)


async def stored_tables(pool: Pool) -> dict[str, str]:
    """Columns by table, as `name type, name type?`, without the tables of the chassis; `?`: it may be null."""
    rows = await pool.fetch(
        """
        SELECT c.relname AS table_name, string_agg(
            a.attname || ' ' || format_type(a.atttypid, a.atttypmod) || CASE WHEN a.attnotnull THEN '' ELSE '?' END,
            ', ' ORDER BY a.attnum
        ) AS columns
        FROM pg_class AS c
        JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
        WHERE c.relnamespace = current_schema()::regnamespace AND c.relkind = 'r'
        GROUP BY c.relname
        """
    )
    tables = {row["table_name"]: row["columns"] for row in rows}
    assert set(CHASSIS_TABLES) <= set(tables)
    return {name: columns for name, columns in tables.items() if name not in CHASSIS_TABLES}


def documented_tables(page: Path) -> dict[str, str]:
    """The same as the page has it, one `table(columns)` a line."""
    found = _DOCUMENTED.findall(page.read_text(encoding="utf-8"))
    return {name: columns.replace("timestamptz", "timestamp with time zone") for name, columns in found}
