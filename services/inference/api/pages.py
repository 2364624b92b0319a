"""Cursors of lists that show the newest row first, by creation time and id."""

from __future__ import annotations

from datetime import UTC, datetime

from chassis.paging import decode_token, encode_token

# The cursor of a first page: after every row.
NEWEST = (datetime(9999, 1, 1, tzinfo=UTC), "~")


def read_cursor(token: str, scope: str) -> tuple[datetime, str]:
    """Where a page begins: after every row for the first one."""
    cursor = decode_token(token, scope=scope, kinds=(str, str))
    return (datetime.fromisoformat(str(cursor[0])), str(cursor[1])) if cursor else NEWEST


def write_cursor(created_at: datetime, id: str, scope: str) -> str:
    """The token of the page after this row."""
    return encode_token((created_at.isoformat(), id), scope=scope)
