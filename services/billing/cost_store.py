"""What things cost, summed by project, model, day and more. It reads sums and settled holds, never single records."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from chassis.db.pool import Connection
from chassis.db.queries import load_queries

_queries = load_queries(Path(__file__).parent / "queries_costs.sql")


class Dimension(enum.StrEnum):
    PROJECT = "project"
    MODEL = "model"
    DAY = "day"
    RESOURCE = "resource"
    API_KEY = "api_key"
    KIND = "kind"


@dataclass(frozen=True, kw_only=True)
class CostRow:
    """`keys` are in the order of the dimensions; `quantity` is 0 where units mix."""

    keys: tuple[str, ...]
    quantity: int
    amount_nanos_usd: int
    usage_record_count: int


async def list_costs(
    connection: Connection,
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
        connection,
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
