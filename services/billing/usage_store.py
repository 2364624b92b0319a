"""Usage records in the database: every function takes a connection, and domain values in and out. It decides nothing."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import asyncpg

from chassis.db.pool import Connection
from chassis.db.queries import load_queries
from services.billing.batch import Terms, UsageBatch
from services.billing.records import JobTotals, UsageKind, UsageRecord

_queries = load_queries(Path(__file__).parent / "queries_usage.sql")


async def insert_usage(connection: Connection, batch: UsageBatch) -> bool:
    """Books all of it, or nothing when any of it is booked already; then False.

    Looking first, or `ON CONFLICT`, costs a third more for every record, and nearly all of them are new.
    """
    terms: Sequence[Terms] = list(batch.terms)
    try:
        async with connection.transaction():
            await _queries.insert_usage(
                connection,
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


async def get_usage(connection: Connection, keys: Iterable[tuple[str, str]]) -> dict[tuple[str, str], UsageRecord]:
    """What is booked for pairs of project id and work key."""
    wanted = list(keys)
    rows = _queries.list_usage_by_key(
        connection, project_ids=[project_id for project_id, _ in wanted], work_keys=[key for _, key in wanted]
    )
    return {(row["project_id"], row["work_key"]): usage_record(row) async for row in rows}


async def get_overlapping_work_key(
    connection: Connection, resource: str, *, start_step: int, end_step: int
) -> str | None:
    work_key: str | None = await _queries.get_overlapping_work_key(
        connection, resource=resource, start_step=start_step, end_step=end_step
    )
    return work_key


async def get_job_totals(connection: Connection, resource: str) -> JobTotals:
    return JobTotals(**await _queries.get_job_totals(connection, resource=resource))


def usage_record(row: Any) -> UsageRecord:
    return UsageRecord(**{**row, "kind": UsageKind(row["kind"])})
