"""Pages of lists that show the newest row first, by creation time and id."""

from __future__ import annotations

from datetime import UTC, datetime

from chassis.paging import Cursor, Page
from services.inference.endpoints.domain import Endpoint
from services.inference.models.domain import TunedModel

KINDS = (str, str)
# Where a first page begins: after every row.
NEWEST = (datetime(9999, 1, 1, tzinfo=UTC), "~")


def before(page: Page) -> tuple[datetime, str]:
    """The creation time and id before which the page's rows lie."""
    if page.cursor is None:
        return NEWEST
    created_at, id = page.cursor
    return datetime.fromisoformat(str(created_at)), str(id)


def cursor_of(row: TunedModel | Endpoint) -> Cursor:
    """The cursor of the page after this row."""
    return row.created_at.isoformat(), row.id
