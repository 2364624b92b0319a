"""Usage records in the database, and the sums that a trigger keeps of them. It decides nothing."""

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any

import asyncpg

from chassis.db.pool import Connection
from chassis.db.queries import load_queries
from services.billing.usage.batch import Terms, UsageBatch
from services.billing.usage.costs import CostRow, Dimension
from services.billing.usage.records import UsageKind, UsageRecord
from services.billing.usage.usage_pages import Position, UsageFilter, UsagePage

_queries = load_queries(Path(__file__).parent / "queries.sql")
_COLUMNS = tuple(field.name for field in fields(UsageRecord))


class UsageStore:
    """Usage records of all kinds, and reports of what they cost."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def insert(self, batch: UsageBatch) -> bool:
        """Books all of it, or nothing when any of it is booked already; then False.

        Looking first, or `ON CONFLICT`, costs a third more for every record, and nearly all of them are new.
        """
        terms: Sequence[Terms] = list(batch.terms)
        try:
            async with self._connection.transaction():
                await _queries.insert_usage(
                    self._connection,
                    work_keys=batch.work_keys,
                    numbers=batch.numbers,
                    quantities=batch.quantities,
                    amounts=batch.amounts,
                    usage_times=batch.usage_times,
                    kinds=[each.kind for each in terms],
                    organization_ids=[each.organization_id for each in terms],
                    project_ids=[each.project_id for each in terms],
                    resources=[each.resource for each in terms],
                    models=[each.model for each in terms],
                    unit_prices=[each.unit_price_nanos_usd for each in terms],
                    price_book_versions=[each.price_book_version for each in terms],
                    billing_months=[each.billing_month for each in terms],
                    api_key_ids=[each.api_key_id for each in terms],
                    transaction_ids=[each.transaction_id for each in terms],
                    start_steps=[each.start_step for each in terms],
                    end_steps=[each.end_step for each in terms],
                )
        except asyncpg.UniqueViolationError:
            return False
        return True

    async def get(self, keys: Iterable[tuple[str, str]]) -> dict[tuple[str, str], UsageRecord]:
        """What is booked for pairs of project id and work key."""
        wanted = list(keys)
        rows = _queries.list_usage_by_key(
            self._connection, project_ids=[project_id for project_id, _ in wanted], work_keys=[key for _, key in wanted]
        )
        return {(row["project_id"], row["work_key"]): _record(row) async for row in rows}

    async def get_overlapping_work_key(self, resource: str, *, start_step: int, end_step: int) -> str | None:
        work_key: str | None = await _queries.get_overlapping_work_key(
            self._connection, resource=resource, start_step=start_step, end_step=end_step
        )
        return work_key

    async def list_newest(
        self, wanted: UsageFilter, *, after: Position | None, row_max: int, scan_max: int
    ) -> UsagePage:
        """Up to `row_max` records, newest first, after the position `after`."""
        before_time, before_key = after or (wanted.end, "")
        looked_at_max = row_max + 1 if wanted.open else max(scan_max, row_max + 1)
        rows = [
            row
            async for row in _queries.list_newest_usage(
                self._connection,
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

    async def list_oldest(self, wanted: UsageFilter, *, after: Position | None, scan_max: int) -> UsagePage:
        """What matches of the next `scan_max` records, oldest first, after the position `after`.

        The month filters here and not in `newest`; model and key filter there and not here.
        """
        after_time, after_key = after or (wanted.start, "")
        rows = [
            row
            async for row in _queries.list_oldest_usage(
                self._connection,
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

    async def within_month(self, wanted: UsageFilter, organization_id: str) -> UsageFilter:
        """The same filter, with its span cut to the days that have records behind its month's invoice.

        Records that came late or belong to a job can be of any day.
        """
        days = await _queries.get_billed_days(
            self._connection,
            organization_id=organization_id,
            billing_month=wanted.billing_month,
            project_id=wanted.project_id,
        )
        if days["first_day"] is None:
            return replace(wanted, end=wanted.start)
        first = datetime.combine(days["first_day"], time(), UTC)
        after_last = datetime.combine(days["last_day"] + timedelta(days=1), time(), UTC)
        return replace(wanted, start=max(wanted.start, first), end=min(wanted.end, after_last))

    async def list_costs(
        self,
        organization_id: str,
        *,
        project_id: str,
        start_day: date,
        end_day: date,
        dimensions: Sequence[Dimension],
        row_max: int,
    ) -> list[CostRow]:
        """Sums of the days from `start_day` to `end_day`, both included, sorted by their keys.

        What a settlement adds to the worth of its job's records, or takes from it, has the kind `job_settlement`.
        """
        rows = _queries.list_costs(
            self._connection,
            organization_id=organization_id,
            project_id=project_id,
            start_day=start_day,
            end_day=end_day,
            # A job is never billed in a month before its end: that bounds the holds that are looked at.
            first_month=start_day.replace(day=1),
            dimensions=list(dimensions),
            row_max=row_max,
        )
        found = [
            CostRow(
                keys=tuple(row[dimension] for dimension in dimensions),
                quantity=row["quantity"],
                amount_nanos_usd=row["amount_nanos_usd"],
                usage_record_count=row["usage_record_count"],
            )
            async for row in rows
        ]
        return sorted(found, key=lambda row: row.keys)


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
