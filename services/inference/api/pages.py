"""Pages of lists that show the newest row first, by creation time and id."""

from __future__ import annotations

from datetime import UTC, datetime

from chassis.paging import Cursor, Page, time_cursor
from services.inference.endpoints.domain import Endpoint
from services.inference.models.domain import TunedModel

# Where a first page begins: after every row.
NEWEST = (datetime(9999, 1, 1, tzinfo=UTC), "~")


def before(page: Page) -> tuple[datetime, str]:
    """The creation time and id before which the page's rows lie."""
    return page.after_time(str) or NEWEST


def cursor_of(row: TunedModel | Endpoint) -> Cursor:
    """The cursor of the page after this row."""
    return time_cursor(row.created_at, row.id)
