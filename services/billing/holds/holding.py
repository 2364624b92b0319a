"""Sets money aside for a job, gives it back, or charges it. Not pure: database.

Each function runs in the caller's transaction. Locks are taken in one order everywhere: the job, then organizations
sorted by id.
"""

from datetime import datetime, timedelta

import structlog
from opentelemetry import metrics

from chassis.db.pool import Connection
from chassis.errors import AlreadyExists, FailedPrecondition, FieldViolation
from services.billing.budgets.caps import Spender
from services.billing.budgets.review import refuse_over_cap
from services.billing.holds import settlement
from services.billing.holds.hold import Hold, HoldState, JobEnding, JobTotals
from services.billing.holds.store import HoldStore
from services.billing.leasing.credit_lease import Leased
from services.billing.leasing.granting import balance_insufficient
from services.billing.leasing.store import LeaseStore
from services.billing.ledger import entries
from services.billing.ledger.derived_ids import hold_id
from services.billing.ledger.entries import BalanceInsufficient, Balances
from services.billing.ledger.store import LedgerStore
from services.billing.limits import Limits
from services.billing.prices.catalogue import Catalogue
from services.billing.prices.pricebook import PriceBook, price_job
from services.billing.prices.pricing import Metered, Price, Work, quote

_log = structlog.get_logger(__name__)
_meter = metrics.get_meter(__name__)
_settled = _meter.create_counter("billing.settlements", unit="{job}")
_discrepancies = _meter.create_counter("billing.discrepancies", unit="{job}")


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
    late_usage: timedelta,
    api_key_id: str = "",
) -> Hold:
    """Prices and holds; the same job gets the same hold again. `book` prices a job that has none yet.

    `late_usage` is how long a lease that was closed waits for the usage of its calls.
    """
    holds = HoldStore(connection)
    ledger = LedgerStore(connection)
    await holds.lock_job(resource)
    existing = await holds.get(resource)
    if existing is not None:
        return _same(existing, organization_id, project_id, work)
    if await holds.get_ending(resource) is not None:
        raise FailedPrecondition("STATE_CONFLICT", f"{resource} has ended; nothing can be held for it any more")
    price = price_job(book, work, limits)
    standings = await ledger.lock([organization_id])
    leased = await LeaseStore(connection).get_leased(organization_id, Spender(project_id, api_key_id), late_usage)
    await refuse_over_cap(
        connection,
        organization_id=organization_id,
        project_id=project_id,
        api_key_id=api_key_id,
        required_nanos_usd=price.total_nanos_usd,
        leased_nanos_usd=leased.by_spender,
        now=now,
    )
    try:
        entry = entries.hold(
            _balances_for(price, standings[organization_id].balances, leased),
            organization_id=organization_id,
            resource=resource,
            amount_nanos_usd=price.total_nanos_usd,
            price_book_version=book.version,
            now=now,
        )
    except BalanceInsufficient as error:
        raise balance_insufficient(error, what="the job") from error
    hold = Hold(
        id=hold_id(resource),
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
        expire_time=await holds.get_expire_time(ttl),
        end_time=None,
        api_key_id=api_key_id,
    )
    await holds.insert(hold)
    await ledger.post(standings, [entry] if entry else [])
    return hold


def _balances_for(price: Price, balances: Balances, leased: Leased) -> Balances:
    """What is leased comes back without a top-up. So who lacks credit even with all of it is told what to add."""
    enough = price.total_nanos_usd <= balances.available_nanos_usd
    return balances.beside(leased.nanos_usd) if enough else balances


async def release_hold(connection: Connection, *, resource: str, now: datetime) -> Hold | None:
    """Gives back the hold of a job that never ran and returns it as it was; None when nothing was held any more."""
    holds = HoldStore(connection)
    ledger = LedgerStore(connection)
    await holds.lock_job(resource)
    hold = await holds.get(resource)
    if hold is None or hold.state is not HoldState.HELD:
        return None
    # An ending that did not settle the hold waits for usage: what comes after a release could not be booked any more.
    ended = await holds.get_ending(resource)
    if ended is not None or (await holds.get_job_totals(resource)).record_count:
        raise FailedPrecondition(
            "STATE_CONFLICT", f"{resource} has run; its final event settles it, it cannot be released"
        )
    standings = await ledger.lock([hold.organization_id])
    entry = entries.release(
        organization_id=hold.organization_id,
        resource=resource,
        held_nanos_usd=hold.held_nanos_usd,
        price_book_version=hold.price_book_version,
        now=now,
    )
    if not await holds.end(resource, "release", end_time=now):
        raise FailedPrecondition("STATE_CONFLICT", f"the hold of {resource} ended meanwhile")
    await ledger.post(standings, [entry] if entry else [])
    return hold


async def settle_hold(
    connection: Connection,
    catalogue: Catalogue,
    hold: Hold,
    ending: JobEnding,
    totals: JobTotals,
    now: datetime,
    note: str = "",
) -> None:
    """Charges what is booked and frees the rest. The job is locked; `note` says what is unusual about it."""
    ledger = LedgerStore(connection)
    book = catalogue.version(hold.price_book_version)
    decided = settlement.settle(
        ending=ending.ending,
        held_nanos_usd=hold.held_nanos_usd,
        rule=book.tuning_rule,
        nanos_usd_per_million=book.work_rate(hold.work),
        work=hold.work,
        metered=Metered(training_tokens=totals.training_tokens, validation_tokens=totals.evaluation_tokens),
    )
    discrepancy = "; ".join(filter(None, (note, decided.discrepancy)))
    if discrepancy:
        _discrepancies.add(1)
        _log.error("settlement_discrepancy", resource=hold.resource, discrepancy=discrepancy)
    standings = await ledger.lock([hold.organization_id])
    entry = entries.settle(
        organization_id=hold.organization_id,
        resource=hold.resource,
        held_nanos_usd=hold.held_nanos_usd,
        charge_nanos_usd=decided.charge_nanos_usd,
        price_book_version=hold.price_book_version,
        end_time=ending.end_time,
    )
    months = await ledger.open_months([hold.organization_id], [ending.end_time], now)
    settled = await HoldStore(connection).end(
        hold.resource,
        "settle",
        end_time=ending.end_time,
        charged_nanos_usd=decided.charge_nanos_usd,
        price=decided.price,
        adjustment_nanos_usd=decided.charge_nanos_usd - totals.amount_nanos_usd,
        billing_month=months.of(hold.organization_id, ending.end_time),
        discrepancy=discrepancy,
    )
    assert settled, "the job is locked, so nobody else can have ended its hold"
    await ledger.post(standings, [entry] if entry else [])
    _settled.add(1, {"ending": ending.ending})


def quote_of(hold: Hold, book: PriceBook) -> Price:
    """The quote behind a hold, by the version that made it."""
    return quote(book.tuning_rule, book.work_rate(hold.work), hold.work)


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
