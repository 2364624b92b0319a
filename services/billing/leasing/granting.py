"""Grants leases of credit. Not pure: database.

It runs in one transaction under the lock of the organization's chain, as holds and bookings do. So all leases, holds
and entries together never exceed what is available or a cap.
"""

from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from chassis.db.pool import Connection
from chassis.errors import Aborted, FailedPrecondition
from services.billing.budgets.caps import CapExceeded, Spender
from services.billing.budgets.review import budgets_of, cap_exceeded
from services.billing.calendar import Month
from services.billing.leasing.credit_lease import CreditLease, Room, grown, room_of
from services.billing.leasing.store import LeaseStore
from services.billing.ledger.entries import BalanceInsufficient
from services.billing.ledger.store import LedgerStore
from services.billing.prices.pricing import in_dollars


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What a holder wants a lease to come to; both amounts are totals of the lease."""

    holder: str
    lease_id: str
    organization_id: str
    spender: Spender
    revision: int
    required_nanos_usd: int
    wanted_nanos_usd: int


async def grant(connection: Connection, wish: Wish, *, share: int, late_usage: timedelta, now: datetime) -> CreditLease:
    """The lease as it is now; a typed error when what is required is not there.

    Beyond what is required it takes at most one part in `share` of what is left.
    """
    leases = LeaseStore(connection)
    standings = await LedgerStore(connection).lock([wish.organization_id])
    if not await leases.is_alive(wish.holder):
        raise Aborted("LEASE_STALE", f"{wish.holder} did not renew its leases in time; begin with new ones")
    lease = await leases.lock_lease(wish.lease_id) or _new(wish)
    if _owner(lease) != (wish.holder, wish.organization_id, wish.spender) or lease.closed_time is not None:
        raise Aborted("LEASE_STALE", f"lease {wish.lease_id} is another's or closed; begin with a new one")
    if lease.revision >= wish.revision:
        raise Aborted("LEASE_STALE", f"lease {wish.lease_id} has changed since; this request came late")
    budgets = await budgets_of(connection, wish.organization_id, wish.spender, now)
    leased = await leases.get_leased(wish.organization_id, wish.spender, late_usage)
    room = room_of(standings[wish.organization_id].balances.available_nanos_usd, budgets, leased)
    total = grown(
        room,
        granted_nanos_usd=lease.granted_nanos_usd,
        required_nanos_usd=wish.required_nanos_usd,
        wanted_nanos_usd=wish.wanted_nanos_usd,
        share=share,
    )
    if total < wish.required_nanos_usd:
        raise _refusal(room, wish.required_nanos_usd - lease.granted_nanos_usd, Month.of(now))
    granted = replace(lease, granted_nanos_usd=total, revision=wish.revision)
    await leases.save(granted)
    return granted


def balance_insufficient(error: BalanceInsufficient, *, what: str) -> FailedPrecondition:
    """The typed error; `what` needs more credit than is free."""
    return FailedPrecondition(
        "BALANCE_INSUFFICIENT",
        f"{what} needs {in_dollars(error.required_nanos_usd)} USD and {in_dollars(error.available_nanos_usd)} USD are"
        f" free: add at least {in_dollars(error.shortfall_nanos_usd)} USD of credit",
        metadata={
            "required_nanos_usd": str(error.required_nanos_usd),
            "available_nanos_usd": str(error.available_nanos_usd),
            "shortfall_nanos_usd": str(error.shortfall_nanos_usd),
        },
    )


def _new(wish: Wish) -> CreditLease:
    return CreditLease(
        lease_id=wish.lease_id,
        holder=wish.holder,
        organization_id=wish.organization_id,
        project_id=wish.spender.project_id,
        api_key_id=wish.spender.api_key_id,
        granted_nanos_usd=0,
        used_nanos_usd=0,
        revision=0,
        closed_time=None,
    )


def _owner(lease: CreditLease) -> tuple[str, str, Spender]:
    return lease.holder, lease.organization_id, Spender(lease.project_id, lease.api_key_id)


def _refusal(room: Room, required_nanos_usd: int, month: Month) -> FailedPrecondition:
    if room.budget is None:
        error = BalanceInsufficient(required_nanos_usd=required_nanos_usd, available_nanos_usd=room.nanos_usd)
        return balance_insufficient(error, what="the call")
    left = max(0, room.nanos_usd)
    exceeded = CapExceeded(room.budget, required_nanos_usd=required_nanos_usd, room_nanos_usd=left)
    return cap_exceeded(exceeded, month, what="the call")
