"""Billing's tables: every function takes a connection, and domain values in and out. It decides nothing."""

import uuid
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from chassis.db.pool import Connection
from chassis.db.queries import affected, load_queries
from services.billing.invoice import Charge, LineKind, Month
from services.billing.ledger import HOLD_TRANSITIONS, Account, Balances, HoldState, Transaction
from services.billing.pricing import Price, Work
from services.billing.records import Hold, JobEnding, JobTotals, UsageKind, UsageRecord
from services.billing.settlement import Ending

MIGRATIONS = Path(__file__).parent / "migrations"
_queries = load_queries(Path(__file__).parent / "queries.sql")


async def list_price_books(connection: Connection) -> dict[str, str]:
    """Version -> YAML text."""
    return {row["version"]: row["source"] async for row in _queries.list_price_books(connection)}


async def insert_price_book(connection: Connection, *, version: str, book: str, source: str) -> None:
    await _queries.insert_price_book(connection, version=version, book=book, source=source)


async def lock_job(connection: Connection, resource: str) -> None:
    """Comes before any account lock, always."""
    await _queries.lock_job(connection, resource=resource)


async def lock_accounts(connection: Connection, organization_ids: Iterable[str]) -> dict[str, Balances]:
    """Opens accounts that are missing, locks all of them until the end of the transaction, and reads them."""
    wanted = sorted(set(organization_ids))
    rows = [row async for row in _queries.lock_accounts(connection, organization_ids=wanted)]
    if len(rows) < len(wanted) * len(Account):
        await _queries.ensure_accounts(connection, organization_ids=wanted)
        rows = [row async for row in _queries.lock_accounts(connection, organization_ids=wanted)]
    return {
        organization_id: _balances([row for row in rows if row["organization_id"] == organization_id])
        for organization_id in wanted
    }


async def get_balances(connection: Connection, organization_id: str) -> Balances:
    return _balances([row async for row in _queries.get_balances(connection, organization_id=organization_id)])


async def post(connection: Connection, transactions: Sequence[Transaction]) -> None:
    """Writes ledger transactions. The accounts of their organizations must be locked."""
    if not transactions:
        return
    await _queries.insert_transactions(
        connection,
        ids=[entry.id for entry in transactions],
        kinds=[entry.kind for entry in transactions],
        organization_ids=[entry.organization_id for entry in transactions],
        resources=[entry.resource for entry in transactions],
        price_book_versions=[entry.price_book_version for entry in transactions],
        transaction_times=[entry.transaction_time for entry in transactions],
    )
    postings = [(entry, posting) for entry in transactions for posting in entry.postings]
    await _queries.insert_postings(
        connection,
        transaction_ids=[entry.id for entry, _ in postings],
        organization_ids=[entry.organization_id for entry, _ in postings],
        accounts=[posting.account for _, posting in postings],
        amounts=[posting.amount_nanos_usd for _, posting in postings],
    )


async def get_posted_amount(connection: Connection, transaction_id: uuid.UUID, account: Account) -> int | None:
    amount: int | None = await _queries.get_posted_amount(connection, transaction_id=transaction_id, account=account)
    return amount


async def list_transaction_ids(connection: Connection, resource: str) -> list[uuid.UUID]:
    return [row["id"] async for row in _queries.list_transaction_ids(connection, resource=resource)]


async def insert_hold(connection: Connection, hold: Hold) -> None:
    await _queries.insert_hold(
        connection,
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
    )


async def get_hold(connection: Connection, resource: str) -> Hold | None:
    row = await _queries.get_hold(connection, resource=resource)
    return _hold(row) if row is not None else None


async def end_hold(
    connection: Connection,
    resource: str,
    event: str,
    *,
    end_time: datetime,
    charged_nanos_usd: int = 0,
    price: Price | None = None,
    discrepancy: str = "",
) -> bool:
    """`event` is a key of HOLD_TRANSITIONS; False when the hold was in no state that allows it."""
    sources, state = HOLD_TRANSITIONS[event]
    status = await _queries.end_hold(
        connection,
        resource=resource,
        sources=sorted(sources),
        state=state,
        charged_nanos_usd=charged_nanos_usd,
        minimum_applied=price.minimum_applied if price else False,
        billed_tokens=price.tokens if price else 0,
        discrepancy=discrepancy,
        end_time=end_time,
    )
    return affected(status) == 1


async def insert_job_ending(connection: Connection, ending: JobEnding) -> None:
    await _queries.insert_job_ending(
        connection,
        resource=ending.resource,
        organization_id=ending.organization_id,
        project_id=ending.project_id,
        ending=ending.ending,
        usage_record_count=ending.usage_record_count,
        end_time=ending.end_time,
    )


async def get_job_ending(connection: Connection, resource: str) -> JobEnding | None:
    row = await _queries.get_job_ending(connection, resource=resource)
    return JobEnding(**{**row, "ending": Ending(row["ending"])}) if row is not None else None


async def insert_usage(connection: Connection, records: Sequence[UsageRecord]) -> set[uuid.UUID]:
    """Returns the ids that are new; the others were booked before and stay as they are."""
    rows = _queries.insert_usage_records(
        connection,
        ids=[record.id for record in records],
        work_keys=[record.work_key for record in records],
        kinds=[record.kind for record in records],
        organization_ids=[record.organization_id for record in records],
        project_ids=[record.project_id for record in records],
        resources=[record.resource for record in records],
        models=[record.model for record in records],
        quantities=[record.quantity for record in records],
        unit_prices=[record.unit_price_nanos_usd for record in records],
        amounts=[record.amount_nanos_usd for record in records],
        price_book_versions=[record.price_book_version for record in records],
        start_steps=[record.start_step for record in records],
        end_steps=[record.end_step for record in records],
        usage_times=[record.usage_time for record in records],
    )
    return {row["id"] async for row in rows}


async def get_usage(connection: Connection, ids: Iterable[uuid.UUID]) -> dict[uuid.UUID, UsageRecord]:
    rows = _queries.list_usage_by_id(connection, ids=sorted(ids))
    return {row["id"]: _usage_record(row) async for row in rows}


async def get_overlapping_work_key(
    connection: Connection, resource: str, *, start_step: int, end_step: int
) -> str | None:
    work_key: str | None = await _queries.get_overlapping_work_key(
        connection, resource=resource, start_step=start_step, end_step=end_step
    )
    return work_key


async def get_job_totals(connection: Connection, resource: str) -> JobTotals:
    return JobTotals(**await _queries.get_job_totals(connection, resource=resource))


async def list_usage(
    connection: Connection,
    project_id: str,
    *,
    resource: str,
    before: tuple[datetime, uuid.UUID] | None,
    row_max: int,
) -> list[UsageRecord]:
    """Newest first, beginning after the record that `before` names."""
    before_time, before_id = before or (None, None)
    rows = _queries.list_usage(
        connection,
        project_id=project_id,
        resource=resource,
        before_time=before_time,
        before_id=before_id,
        row_max=row_max,
    )
    return [_usage_record(row) async for row in rows]


async def list_charges(
    connection: Connection, organization_id: str, month: Month, *, name_max: int, row_max: int
) -> list[Charge]:
    """What a month's invoice is made of, at most `row_max` of each source."""
    scope = {
        "organization_id": organization_id,
        "month_start": month.start,
        "month_end": month.end,
        "name_max": name_max,
        "row_max": row_max,
    }
    tuning = [_charge(row, LineKind.TUNING) async for row in _queries.list_tuning_charges(connection, **scope)]
    served = [_charge(row, LineKind(row["kind"])) async for row in _queries.list_served_charges(connection, **scope)]
    return tuning + served


def _balances(rows: Iterable[Any]) -> Balances:
    amounts = {row["account"]: row["balance_nanos_usd"] for row in rows}
    return Balances(
        prepaid_nanos_usd=amounts.get(Account.PREPAID, 0),
        held_nanos_usd=amounts.get(Account.HELD, 0),
        receivable_nanos_usd=amounts.get(Account.RECEIVABLE, 0),
    )


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
        end_time=row["end_time"],
    )


def _usage_record(row: Any) -> UsageRecord:
    return UsageRecord(**{**row, "kind": UsageKind(row["kind"])})


def _charge(row: Any, kind: LineKind) -> Charge:
    return Charge(
        kind=kind,
        resource=row["resource"],
        model=row["model"],
        quantity=row["quantity"],
        unit_price_nanos_usd=row["unit_price_nanos_usd"],
        amount_nanos_usd=row["amount_nanos_usd"],
        price_book_version=row["price_book_version"],
        usage_records=tuple(row["record_names"]),
        usage_record_count=row["record_count"],
        minimum_applied=row.get("minimum_applied", False),
    )
