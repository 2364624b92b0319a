"""Billing's tables: every function takes a connection, and domain values in and out. It decides nothing."""

import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Any

from chassis.db.pool import Connection
from chassis.db.queries import affected, load_queries
from services.billing.chain import Link, links
from services.billing.ledger import (
    HOLD_TRANSITIONS,
    Account,
    Balances,
    HoldState,
    Transaction,
    after,
)
from services.billing.pricing import Price, Work
from services.billing.records import Hold, JobEnding
from services.billing.settlement import Ending

MIGRATIONS = Path(__file__).parent / "migrations"
_queries = load_queries(Path(__file__).parent / "queries.sql")


@dataclass
class Standing:
    """Where an organization's money stands while it is locked; `store.post` moves it on."""

    head: Link
    balances: Balances


async def list_price_books(connection: Connection) -> dict[str, str]:
    """Version -> YAML text."""
    return {row["version"]: row["source"] async for row in _queries.list_price_books(connection)}


async def insert_price_book(connection: Connection, *, version: str, book: str, source: str) -> None:
    await _queries.insert_price_book(connection, version=version, book=book, source=source)


async def get_last_priced_day(connection: Connection, version: str) -> date | None:
    """The last day of use that was priced by this version because it was in force."""
    day: date | None = await _queries.get_last_priced_day(connection, version=version)
    return day


async def lock_job(connection: Connection, resource: str) -> None:
    """Comes before the lock of an organization, always."""
    await _queries.lock_job(connection, resource=resource)


async def lock_organizations(connection: Connection, organization_ids: Iterable[str]) -> dict[str, Standing]:
    """Locks the money of organizations until the end of the transaction, opening what is missing, and reads it.

    Whoever decides about an organization's money does it under this lock; it comes after the lock of a job, always.
    """
    wanted = sorted(set(organization_ids))
    if not wanted:
        return {}
    heads = await _lock_chains(connection, wanted)
    if len(heads) < len(wanted):
        await _queries.ensure_chains(connection, organization_ids=wanted)
        await _queries.ensure_accounts(connection, organization_ids=wanted)
        heads = await _lock_chains(connection, wanted)
    rows: dict[str, list[Any]] = {organization_id: [] for organization_id in wanted}
    # A statement of its own: what it reads is what the holder of the lock before us left behind.
    async for row in _queries.list_balances(connection, organization_ids=wanted):
        rows[row["organization_id"]].append(row)
    return {key: Standing(head=heads[key], balances=_balances(rows[key])) for key in wanted}


async def get_balances(connection: Connection, organization_id: str) -> Balances:
    return _balances([row async for row in _queries.list_balances(connection, organization_ids=[organization_id])])


async def post(connection: Connection, standings: dict[str, Standing], entries: Sequence[Transaction]) -> None:
    """Writes ledger transactions, each after the last of its organization. `standings` come from the lock and move on."""
    if not entries:
        return
    linked: list[tuple[Transaction, Link]] = []
    for organization_id in sorted({entry.organization_id for entry in entries}):
        own = [entry for entry in entries if entry.organization_id == organization_id]
        made = links(standings[organization_id].head, own)
        linked += zip(own, made, strict=True)
        standings[organization_id].head = made[-1]
        standings[organization_id].balances = after(standings[organization_id].balances, own)
    await _queries.insert_transactions(
        connection,
        ids=[entry.id for entry, _ in linked],
        kinds=[entry.kind for entry, _ in linked],
        organization_ids=[entry.organization_id for entry, _ in linked],
        resources=[entry.resource for entry, _ in linked],
        price_book_versions=[entry.price_book_version for entry, _ in linked],
        transaction_times=[entry.transaction_time for entry, _ in linked],
        positions=[link.position for _, link in linked],
        hashes=[link.hash for _, link in linked],
    )
    postings = [(entry, link, posting) for entry, link in linked for posting in entry.postings]
    await _queries.insert_postings(
        connection,
        organization_ids=[entry.organization_id for entry, _, _ in postings],
        positions=[link.position for _, link, _ in postings],
        accounts=[posting.account for _, _, posting in postings],
        amounts=[posting.amount_nanos_usd for _, _, posting in postings],
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
        expire_time=hold.expire_time,
        api_key_id=hold.api_key_id,
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
    adjustment_nanos_usd: int = 0,
    billing_month: date | None = None,
    discrepancy: str = "",
) -> bool:
    """`event` is a key of HOLD_TRANSITIONS; False when the hold was in no state that allows it.

    `billing_month` is needed for "settle": the month whose invoice has the charge.
    """
    sources, state = HOLD_TRANSITIONS[event]
    status = await _queries.end_hold(
        connection,
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


async def adjust_hold(connection: Connection, resource: str, amount_nanos_usd: int) -> None:
    """Moves what a settled job's charge is more than its usage records are worth."""
    await _queries.adjust_hold(connection, resource=resource, amount_nanos_usd=amount_nanos_usd)


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


async def dump_ledger(connection: Connection) -> AsyncIterator[tuple[Any, ...]]:
    """Every posting with its transaction, without the chain: the same for the same events in any order."""
    async for row in _queries.dump_ledger(connection):
        yield tuple(row)


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
        expire_time=row["expire_time"],
        end_time=row["end_time"],
        api_key_id=row["api_key_id"],
    )


async def _lock_chains(connection: Connection, organization_ids: list[str]) -> dict[str, Link]:
    rows = _queries.lock_chains(connection, organization_ids=organization_ids)
    return {row["organization_id"]: Link(position=row["position"], hash=row["hash"]) async for row in rows}
