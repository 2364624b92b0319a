"""Pages of usage records with filters, newest or oldest first.

One page looks at a bounded number of records, so that a rare filter over very many records costs many short statements
and never one long one: a page may then hold fewer records than were asked for, and still tell where to go on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any

from chassis.db.pool import Connection
from chassis.db.queries import load_queries
from services.billing.records import UsageKind, UsageRecord

_queries = load_queries(Path(__file__).parent / "queries_pages.sql")

# Before and after every record that can be booked.
EARLIEST, LATEST = datetime(2000, 1, 1, tzinfo=UTC), datetime(9000, 1, 1, tzinfo=UTC)
_COLUMNS = tuple(field.name for field in fields(UsageRecord))

Position = tuple[datetime, str]


@dataclass(frozen=True, kw_only=True)
class UsageFilter:
    """Records of one project whose use ended from `start` on and before `end`. Empty texts and kinds filter nothing."""

    project_id: str
    start: datetime = EARLIEST
    end: datetime = LATEST
    resource: str = ""
    kinds: tuple[UsageKind, ...] = ()
    model: str = ""
    api_key_id: str = ""
    billing_month: date | None = None

    @property
    def open(self) -> bool:
        """Whether every record of the span matches."""
        return not (self.resource or self.kinds or self.model or self.api_key_id)


@dataclass(frozen=True, kw_only=True)
class UsagePage:
    """`next` is where the next page begins; None when there is nothing more."""

    records: tuple[UsageRecord, ...]
    next: Position | None


async def newest(
    connection: Connection, wanted: UsageFilter, *, after: Position | None, row_max: int, scan_max: int
) -> UsagePage:
    """Up to `row_max` records, newest first, after the position `after`."""
    before_time, before_key = after or (wanted.end, "")
    looked_at_max = row_max + 1 if wanted.open else max(scan_max, row_max + 1)
    rows = [
        row
        async for row in _queries.list_newest_usage(
            connection,
            project_id=wanted.project_id,
            start_time=wanted.start,
            before_time=before_time,
            before_key=before_key,
            resource=wanted.resource,
            kinds=list(wanted.kinds),
            model=wanted.model,
            api_key_id=wanted.api_key_id,
            scan_max=looked_at_max,
            row_max=row_max + 1,
        )
    ]
    return _page(rows, row_max=row_max, looked_at_max=looked_at_max)


async def oldest(connection: Connection, wanted: UsageFilter, *, after: Position | None, scan_max: int) -> UsagePage:
    """What matches of the next `scan_max` records, oldest first, after the position `after`.

    The month filters here and not in `newest`; model and key filter there and not here.
    """
    after_time, after_key = after or (wanted.start, "")
    rows = [
        row
        async for row in _queries.list_oldest_usage(
            connection,
            project_id=wanted.project_id,
            end_time=wanted.end,
            after_time=after_time,
            after_key=after_key,
            resource=wanted.resource,
            kinds=list(wanted.kinds),
            billing_month=wanted.billing_month,
            scan_max=scan_max,
        )
    ]
    return _page(rows, row_max=scan_max, looked_at_max=scan_max)


async def within_month(connection: Connection, wanted: UsageFilter, organization_id: str) -> UsageFilter:
    """The same filter, with its span cut to the days that have records behind its month's invoice: those that came late
    or belong to a job can be of any day."""
    days = await _queries.get_billed_days(
        connection,
        organization_id=organization_id,
        billing_month=wanted.billing_month,
        project_id=wanted.project_id,
    )
    if days["first_day"] is None:
        return replace(wanted, end=wanted.start)
    first = datetime.combine(days["first_day"], time(), UTC)
    after_last = datetime.combine(days["last_day"] + timedelta(days=1), time(), UTC)
    return replace(wanted, start=max(wanted.start, first), end=min(wanted.end, after_last))


def _page(rows: Sequence[Any], *, row_max: int, looked_at_max: int) -> UsagePage:
    matching = [row for row in rows if row["matches"]]
    shown = matching[:row_max]
    last = None
    if len(matching) > row_max:
        last = shown[-1]
    elif rows and rows[-1]["seen_count"] == looked_at_max:
        last = rows[-1]
    return UsagePage(
        records=tuple(_record(row) for row in shown),
        next=(last["usage_time"], last["work_key"]) if last is not None else None,
    )


def _record(row: Any) -> UsageRecord:
    values = {name: row[name] for name in _COLUMNS}
    return UsageRecord(**{**values, "kind": UsageKind(values["kind"])})
