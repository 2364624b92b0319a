"""What an invoice is made of, read from sums of usage and settled holds. It decides nothing, and rounds
only totals of lists."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path

from chassis.db.pool import Connection
from chassis.db.queries import load_queries
from services.billing.invoice import SERVED, Charge, LineKind
from services.billing.ledger import usage_record_id
from services.billing.pricing import NANOS_USD_PER_CENT
from services.billing.records import UsageKind

_queries = load_queries(Path(__file__).parent / "queries_documents.sql")

_Key = tuple[str, str, str, str, str, int]


async def list_charges(connection: Connection, organization_id: str, month: date, *, row_max: int) -> list[Charge]:
    """The charges of a month without the names of their records, at most `row_max` of each source."""
    scope = {"organization_id": organization_id, "billing_month": month, "row_max": row_max}
    tuning = [
        Charge(kind=LineKind.TUNING, usage_kind="", **row)
        async for row in _queries.list_tuning_charges(connection, **scope)
    ]
    served = [
        Charge(kind=SERVED[UsageKind(row["usage_kind"])], **row)
        async for row in _queries.list_served_charges(connection, **scope)
    ]
    return tuning + served


async def get_totals(connection: Connection, organization_id: str, months: Sequence[date]) -> dict[date, int]:
    """The totals that the invoices of these months would have, rounded by line as they are: nano-dollars by month."""
    rows = _queries.list_totals(
        connection, organization_id=organization_id, billing_months=months, cent=NANOS_USD_PER_CENT
    )
    found = {row["billing_month"]: row["total_nanos_usd"] async for row in rows}
    return {month: found.get(month, 0) for month in months}


async def with_names(
    connection: Connection,
    organization_id: str,
    month: date,
    charges: Sequence[Charge],
    *,
    name_max: int,
    scan_max: int,
) -> list[Charge]:
    """The charges with the names of up to `name_max` records each.

    At most `scan_max` records of what was served are looked at, from each day on: a line whose records come after very
    many others of their day is left without names, and still has their number.
    """
    scope = {"organization_id": organization_id, "billing_month": month, "name_max": name_max}
    jobs: dict[str, list[str]] = defaultdict(list)
    if any(charge.kind is LineKind.TUNING for charge in charges):
        async for row in _queries.list_tuning_names(connection, **scope):
            jobs[row["resource"]].append(_name(row["project_id"], row["work_key"]))
    lines: dict[_Key, list[str]] = defaultdict(list)
    if any(charge.kind is not LineKind.TUNING for charge in charges):
        async for row in _queries.list_served_names(connection, **scope, scan_max=scan_max):
            key = (
                row["project_id"],
                row["resource"],
                row["model"],
                row["usage_kind"],
                row["price_book_version"],
                row["unit_price_nanos_usd"],
            )
            lines[key].append(_name(row["project_id"], row["work_key"]))
    return [replace(charge, usage_records=tuple(_names_of(charge, jobs, lines))) for charge in charges]


def _names_of(charge: Charge, jobs: Mapping[str, list[str]], lines: Mapping[_Key, list[str]]) -> Sequence[str]:
    return jobs.get(charge.resource, ()) if charge.kind is LineKind.TUNING else lines.get(charge.key, ())


def _name(project_id: str, work_key: str) -> str:
    return f"projects/{project_id}/usageRecords/{usage_record_id(project_id, work_key)}"
