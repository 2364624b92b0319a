"""Holds and the endings of jobs in the database. It decides nothing."""

from collections.abc import Sequence
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

from chassis.db.pool import Connection
from chassis.db.queries import affected, load_queries
from services.billing.holds.hold import HOLD_TRANSITIONS, Hold, HoldState, JobEnding, JobTotals, Overdue
from services.billing.holds.settlement import Ending
from services.billing.prices.pricing import Price, Work

_queries = load_queries(Path(__file__).parent / "queries.sql")


class HoldStore:
    """Quotes, the money held for them, and how their jobs ended. How long a hold lasts is in the database's time."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def lock_job(self, resource: str) -> None:
        """Comes before the lock of an organization, always."""
        await _queries.lock_job(self._connection, resource=resource)

    async def insert(self, hold: Hold) -> None:
        await _queries.insert_hold(
            self._connection,
            resource=hold.resource,
            id=hold.id,
            organization_id=hold.organization_id,
            project_id=hold.project_id,
            base_model=hold.work.base_model,
            method=hold.work.method,
            training_tokens=hold.work.training_tokens,
            validation_tokens=hold.work.validation_tokens,
            epochs=hold.work.epochs,
            evaluations=hold.work.evaluations,
            parameter_count=hold.work.parameter_count,
            price_book_version=hold.price_book_version,
            held_nanos_usd=hold.held_nanos_usd,
            hold_time=hold.hold_time,
            expire_time=hold.expire_time,
            api_key_id=hold.api_key_id,
        )

    async def get(self, resource: str) -> Hold | None:
        row = await _queries.get_hold(self._connection, resource=resource)
        return _hold(row) if row is not None else None

    async def end(
        self,
        resource: str,
        event: str,
        *,
        end_time: datetime,
        charged_nanos_usd: int = 0,
        price: Price | None = None,
        adjustment_nanos_usd: int = 0,
        billing_month: date | None = None,
        discrepancy: str = "",
    ) -> bool:
        """`event` is a key of HOLD_TRANSITIONS; False when the hold was in no state that allows it.

        `billing_month` is needed for "settle": the month whose invoice has the charge.
        """
        sources, state = HOLD_TRANSITIONS[event]
        status = await _queries.end_hold(
            self._connection,
            resource=resource,
            sources=sorted(sources),
            state=state,
            charged_nanos_usd=charged_nanos_usd,
            minimum_applied=price.minimum_applied if price else False,
            billed_tokens=price.tokens if price else 0,
            adjustment_nanos_usd=adjustment_nanos_usd,
            billing_month=billing_month,
            discrepancy=discrepancy,
            end_time=end_time,
        )
        return affected(status) == 1

    async def adjust(self, resource: str, amount_nanos_usd: int) -> None:
        """Moves what a settled job's charge is more than its usage records are worth."""
        await _queries.adjust_hold(self._connection, resource=resource, amount_nanos_usd=amount_nanos_usd)

    async def insert_ending(self, ending: JobEnding) -> None:
        await _queries.insert_job_ending(
            self._connection,
            resource=ending.resource,
            organization_id=ending.organization_id,
            project_id=ending.project_id,
            ending=ending.ending,
            usage_record_count=ending.usage_record_count,
            end_time=ending.end_time,
        )

    async def get_ending(self, resource: str) -> JobEnding | None:
        row = await _queries.get_job_ending(self._connection, resource=resource)
        return JobEnding(**{**row, "ending": Ending(row["ending"])}) if row is not None else None

    async def get_job_totals(self, resource: str) -> JobTotals:
        return JobTotals(**await _queries.get_job_totals(self._connection, resource=resource))

    async def get_expire_time(self, ttl: timedelta) -> datetime:
        """Until when a hold lasts that is made or renewed in this transaction."""
        expire_time: datetime = await _queries.get_expire_time(self._connection, ttl_s=ttl.total_seconds())
        return expire_time

    async def renew(self, resources: Sequence[str], ttl: timedelta) -> list[str]:
        """Puts off the end of these holds; returns the jobs whose hold is over or never was."""
        rows = _queries.renew_holds(self._connection, resources=resources, ttl_s=ttl.total_seconds())
        renewed = {row["resource"] async for row in rows}
        return [resource for resource in dict.fromkeys(resources) if resource not in renewed]

    async def list_expired(self, *, after: str, row_max: int) -> list[str]:
        """Jobs whose hold nobody renewed in time, by name."""
        rows = _queries.list_expired_holds(self._connection, after=after, row_max=row_max)
        return [row["resource"] async for row in rows]

    async def count_expired(self) -> Overdue:
        return Overdue(**await _queries.count_expired_holds(self._connection))

    async def lock_expired(self, resource: str) -> bool:
        """Keeps renewals away until the end of the transaction; False when one came before."""
        return await _queries.lock_expired_hold(self._connection, resource=resource) is not None


def _hold(row: Any) -> Hold:
    return Hold(
        id=row["id"],
        resource=row["resource"],
        organization_id=row["organization_id"],
        project_id=row["project_id"],
        state=HoldState(row["state"]),
        work=Work(
            base_model=row["base_model"],
            method=row["method"],
            training_tokens=row["training_tokens"],
            validation_tokens=row["validation_tokens"],
            epochs=row["epochs"],
            evaluations=row["evaluations"],
            parameter_count=row["parameter_count"],
        ),
        price_book_version=row["price_book_version"],
        held_nanos_usd=row["held_nanos_usd"],
        charged_nanos_usd=row["charged_nanos_usd"],
        discrepancy=row["discrepancy"],
        hold_time=row["hold_time"],
        expire_time=row["expire_time"],
        end_time=row["end_time"],
        api_key_id=row["api_key_id"],
    )
