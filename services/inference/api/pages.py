"""Pages of lists that show the newest row first, by creation time and id. Not pure: database, protobuf."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Protocol, TypeVar

from chassis.db.pool import Connection, Pool
from chassis.errors import ResourceExhausted
from chassis.identity import current_caller
from chassis.names import own_parent
from chassis.paging import TIME_KINDS, Cursor, ListRequest, Pages, time_cursor
from finemesh.identity.v1 import identity_pb2
from services.inference.endpoints.domain import Endpoint
from services.inference.models.domain import TunedModel

# Where a first page begins: after every row.
NEWEST = (datetime(9999, 1, 1, tzinfo=UTC), "~")

Row = TypeVar("Row", TunedModel, Endpoint)
AnyRow = TypeVar("AnyRow")
Place = TypeVar("Place")


class ChildrenRequest(ListRequest, Protocol):
    """A request for a list of what a parent has."""

    parent: str


async def own_page(
    pool: Pool,
    pages: Pages,
    request: ChildrenRequest,
    collection: str,
    read: Callable[[Connection, str, tuple[datetime, str], int], Awaitable[Sequence[Row]]],
) -> tuple[Sequence[Row], str]:
    """The rows of the caller's own project that a page shows, and the token of the next page.

    `read` takes a connection, the project's id, the time and id before which the rows lie, and how many to read.
    """
    project_id = own_parent(identity_pb2.Project, request.parent, current_caller())["project"]
    page = pages.read(request, scope=f"{collection}:{project_id}", kinds=TIME_KINDS)
    async with pool.acquire() as connection:
        found = await read(connection, project_id, page.after_time(str) or NEWEST, page.row_max)
    return page.cut(found, cursor_of)


def cursor_of(row: TunedModel | Endpoint) -> Cursor:
    """The cursor of the page after this row."""
    return time_cursor(row.created_at, row.id)


async def every_row(
    read: Callable[[Place, int], Awaitable[Sequence[AnyRow]]],
    begin: Place,
    place_of: Callable[[AnyRow], Place],
    *,
    page_size: int,
    rows_max: int,
) -> list[AnyRow]:
    """All rows of a list that has no pages for its caller. One that is too long is refused, not cut."""
    rows: list[AnyRow] = []
    place = begin
    while True:
        page = await read(place, page_size)
        rows += page
        if len(rows) > rows_max:
            raise ResourceExhausted(
                "SIZE_LIMIT",
                f"there are more than {rows_max} (served_models_max); ListBaseModels, ListModels and ListEndpoints"
                " have pages",
                metadata={"limit": "served_models_max"},
            )
        if len(page) < page_size:
            return rows
        place = place_of(page[-1])
