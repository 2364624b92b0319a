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
from services.billing.leasing.credit_lease import CreditLease, Room, Wish, grown, room_of
from services.billing.leasing.store import LeaseStore
from services.billing.ledger.entries import BalanceInsufficient
from services.billing.ledger.store import LedgerStore
from services.billing.prices.pricing import in_dollars


@dataclass(frozen=True, kw_only=True)
class GrantRequest:
    """Which lease is to come to what; a later request of the holder has a higher revision."""

    holder: str
    lease_id: str
    organization_id: str
    spender: Spender
    revision: int
    wish: Wish


async def grant(
    connection: Connection, request: GrantRequest, *, share: int, late_usage: timedelta, now: datetime
) -> CreditLease:
    """The lease as it is now; a typed error when what is required is not there.

    Beyond what calls wait for it takes at most one part in `share` of what is left.
    """
    leases = LeaseStore(connection)
    standings = await LedgerStore(connection).lock([request.organization_id])
    if not await leases.is_alive(request.holder):
        message = f"{request.holder} did not renew its leases in time; begin with new ones"
        raise Aborted("LEASE_STALE", message, metadata={"holder": request.holder})
    lease = await leases.lock_lease(request.lease_id) or _new(request)
    if _owner(lease) != (request.holder, request.organization_id, request.spender) or lease.closed_time is not None:
        raise Aborted("LEASE_STALE", f"lease {request.lease_id} is another's or closed; begin with a new one")
    if lease.revision >= request.revision:
        raise Aborted("LEASE_STALE", f"lease {request.lease_id} has changed since; this request came late")
    budgets = await budgets_of(connection, request.organization_id, request.spender, now)
    leased = await leases.get_leased(request.organization_id, request.spender, late_usage)
    room = room_of(standings[request.organization_id].balances.available_nanos_usd, budgets, leased)
    total = grown(room, request.wish, granted_nanos_usd=lease.granted_nanos_usd, share=share)
    required = request.wish.required_nanos_usd
    if total < required:
        raise _refusal(room, required - lease.granted_nanos_usd, Month.of(now), what="the call")
    granted = replace(lease, granted_nanos_usd=total, revision=request.revision)
    await leases.save(granted)
    return granted


async def check_room(
    connection: Connection,
    *,
    organization_id: str,
    spender: Spender,
    required_nanos_usd: int,
    late_usage: timedelta,
    now: datetime,
    what: str,
) -> None:
    """A typed error when credit or caps leave less than `what` needs, beside all leases and holds. It takes nothing."""
    standings = await LedgerStore(connection).lock([organization_id])
    budgets = await budgets_of(connection, organization_id, spender, now)
    leased = await LeaseStore(connection).get_leased(organization_id, spender, late_usage)
    room = room_of(standings[organization_id].balances.available_nanos_usd, budgets, leased)
    if required_nanos_usd > room.nanos_usd:
        raise _refusal(room, required_nanos_usd, Month.of(now), what=what)


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


def _new(request: GrantRequest) -> CreditLease:
    return CreditLease(
        lease_id=request.lease_id,
        holder=request.holder,
        organization_id=request.organization_id,
        project_id=request.spender.project_id,
        api_key_id=request.spender.api_key_id,
        granted_nanos_usd=0,
        used_nanos_usd=0,
        revision=0,
        closed_time=None,
    )


def _owner(lease: CreditLease) -> tuple[str, str, Spender]:
    return lease.holder, lease.organization_id, Spender(lease.project_id, lease.api_key_id)


def _refusal(room: Room, required_nanos_usd: int, month: Month, *, what: str) -> FailedPrecondition:
    if room.budget is None:
        error = BalanceInsufficient(required_nanos_usd=required_nanos_usd, available_nanos_usd=room.nanos_usd)
        return balance_insufficient(error, what=what)
    left = max(0, room.nanos_usd)
    exceeded = CapExceeded(room.budget, required_nanos_usd=required_nanos_usd, room_nanos_usd=left)
    return cap_exceeded(exceeded, month, what=what)
