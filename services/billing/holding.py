"""Money that is set aside: top-ups, quotes with their holds, releases. Each function runs in the caller's transaction.

Locks are taken in one order everywhere: the job, then organizations sorted by id.
"""

import uuid
from datetime import datetime, timedelta

from chassis.db.pool import Connection
from chassis.errors import AlreadyExists, FailedPrecondition, FieldViolation, OutOfRange
from services.billing import ledger, spending, store, usage_store
from services.billing.ledger import Account, BalanceInsufficient, Balances, HoldState
from services.billing.pricebook import PriceBook, price_job
from services.billing.pricing import Limits, Price, Work, in_dollars, quote
from services.billing.records import Hold


async def top_up(
    connection: Connection,
    *,
    organization_id: str,
    amount_nanos_usd: int,
    request_id: str,
    now: datetime,
    limits: Limits,
) -> tuple[uuid.UUID, Balances]:
    """Adds credit once per request id; the same id with another amount is REQUEST_ID_REUSED."""
    standings = await store.lock_organizations(connection, [organization_id])
    balances = standings[organization_id].balances
    entry = ledger.top_up(
        organization_id=organization_id, amount_nanos_usd=amount_nanos_usd, request_id=request_id, now=now
    )
    before = await store.get_posted_amount(connection, entry.id, Account.PREPAID)
    if before == amount_nanos_usd:
        return entry.id, balances
    if before is not None:
        raise AlreadyExists(
            "REQUEST_ID_REUSED",
            f"request_id {request_id} came before with {before} nano-dollars; use a new one",
            violations=[FieldViolation("request_id", "was used for a different request")],
        )
    if balances.available_nanos_usd + balances.held_nanos_usd + amount_nanos_usd > limits.amount_nanos_usd_max:
        raise OutOfRange(
            "INVALID_FIELD",
            f"a balance is at most {limits.amount_nanos_usd_max} nano-dollars; add less",
            violations=[FieldViolation("amount_nanos_usd", "would lift the balance over its limit")],
        )
    await store.post(connection, standings, [entry])
    return entry.id, standings[organization_id].balances


async def create_hold(
    connection: Connection,
    book: PriceBook,
    *,
    resource: str,
    organization_id: str,
    project_id: str,
    work: Work,
    now: datetime,
    limits: Limits,
    ttl: timedelta,
    api_key_id: str = "",
) -> Hold:
    """Prices and holds; the same job gets the same hold again. `book` prices a job that has none yet."""
    await store.lock_job(connection, resource)
    existing = await store.get_hold(connection, resource)
    if existing is not None:
        return _same(existing, organization_id, project_id, work)
    if await store.get_job_ending(connection, resource) is not None:
        raise FailedPrecondition("STATE_CONFLICT", f"{resource} has ended; nothing can be held for it any more")
    price = price_job(book, work, limits)
    standings = await store.lock_organizations(connection, [organization_id])
    await spending.refuse_over_cap(
        connection,
        organization_id=organization_id,
        project_id=project_id,
        api_key_id=api_key_id,
        required_nanos_usd=price.total_nanos_usd,
        now=now,
    )
    try:
        entry = ledger.hold(
            standings[organization_id].balances,
            organization_id=organization_id,
            resource=resource,
            amount_nanos_usd=price.total_nanos_usd,
            price_book_version=book.version,
            now=now,
        )
    except BalanceInsufficient as error:
        raise _insufficient(error) from error
    hold = Hold(
        id=ledger.hold_id(resource),
        resource=resource,
        organization_id=organization_id,
        project_id=project_id,
        state=HoldState.HELD,
        work=work,
        price_book_version=book.version,
        held_nanos_usd=price.total_nanos_usd,
        charged_nanos_usd=0,
        discrepancy="",
        hold_time=now,
        expire_time=now + ttl,
        end_time=None,
        api_key_id=api_key_id,
    )
    await store.insert_hold(connection, hold)
    await store.post(connection, standings, [entry] if entry else [])
    return hold


async def release_hold(connection: Connection, *, resource: str, now: datetime) -> Hold | None:
    """Gives back the hold of a job that never ran and returns it as it was; None when nothing was held any more."""
    await store.lock_job(connection, resource)
    hold = await store.get_hold(connection, resource)
    if hold is None or hold.state is not HoldState.HELD:
        return None
    # An ending that did not settle the hold waits for usage: what comes after a release could not be booked any more.
    ended = await store.get_job_ending(connection, resource)
    if ended is not None or (await usage_store.get_job_totals(connection, resource)).record_count:
        raise FailedPrecondition(
            "STATE_CONFLICT", f"{resource} has run; its final event settles it, it cannot be released"
        )
    standings = await store.lock_organizations(connection, [hold.organization_id])
    entry = ledger.release(
        organization_id=hold.organization_id,
        resource=resource,
        held_nanos_usd=hold.held_nanos_usd,
        price_book_version=hold.price_book_version,
        now=now,
    )
    if not await store.end_hold(connection, resource, "release", end_time=now):
        raise FailedPrecondition("STATE_CONFLICT", f"the hold of {resource} ended meanwhile")
    await store.post(connection, standings, [entry] if entry else [])
    return hold


def quote_of(hold: Hold, book: PriceBook) -> Price:
    """The quote behind a hold, by the version that made it."""
    rate = book.tuning_rate(hold.work.base_model, hold.work.method, hold.work.parameter_count)
    return quote(book.tuning_rule, rate, hold.work)


def _same(existing: Hold, organization_id: str, project_id: str, work: Work) -> Hold:
    if (existing.organization_id, existing.project_id, existing.work) != (organization_id, project_id, work):
        raise AlreadyExists(
            "REQUEST_ID_REUSED",
            f"{existing.resource} was quoted with other numbers; a job is quoted once",
            violations=[FieldViolation("resource", "has a hold for different numbers")],
        )
    if existing.state is HoldState.EXPIRED:
        raise FailedPrecondition(
            "HOLD_EXPIRED", f"the hold of {existing.resource} ended because nobody renewed it; a job is held once"
        )
    if existing.state is not HoldState.HELD:
        raise FailedPrecondition("STATE_CONFLICT", f"the hold of {existing.resource} is {existing.state} already")
    return existing


def _insufficient(error: BalanceInsufficient) -> FailedPrecondition:
    return FailedPrecondition(
        "BALANCE_INSUFFICIENT",
        f"the job needs {in_dollars(error.required_nanos_usd)} USD and {in_dollars(error.available_nanos_usd)} USD are"
        f" free: add at least {in_dollars(error.shortfall_nanos_usd)} USD of credit",
        metadata={
            "required_nanos_usd": str(error.required_nanos_usd),
            "available_nanos_usd": str(error.available_nanos_usd),
            "shortfall_nanos_usd": str(error.shortfall_nanos_usd),
        },
    )
