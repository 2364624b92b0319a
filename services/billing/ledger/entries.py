"""The double-entry ledger as pure decisions: accounts, postings that sum to zero, and who may spend what.

It gets balances and moments as values and returns transactions to be written; it knows no table and no clock.
"""

import enum
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from services.billing.ledger.derived_ids import transaction_id


class Account(enum.StrEnum):
    """An organization's accounts; a posting is positive where money arrives.

    FUNDING is the world outside (never above zero), PREPAID what was paid in and is not held, HELD what waits for the
    end of jobs, RECEIVABLE what was served and is owed (never above zero), REVENUE what was earned.
    """

    FUNDING = "funding"
    PREPAID = "prepaid"
    HELD = "held"
    RECEIVABLE = "receivable"
    REVENUE = "revenue"


class TransactionKind(enum.StrEnum):
    TOP_UP = "top_up"
    HOLD = "hold"
    RELEASE = "release"
    SETTLEMENT = "settlement"
    INFERENCE = "inference"
    ENDPOINT = "endpoint"
    CLUSTER = "cluster"
    CREDIT_NOTE = "credit_note"


class BalanceInsufficient(Exception):
    """The free balance does not cover what must be held."""

    def __init__(self, *, required_nanos_usd: int, available_nanos_usd: int) -> None:
        super().__init__(f"{required_nanos_usd} nano-dollars are needed and {available_nanos_usd} are free")
        self.required_nanos_usd = required_nanos_usd
        self.available_nanos_usd = available_nanos_usd

    @property
    def shortfall_nanos_usd(self) -> int:
        return self.required_nanos_usd - self.available_nanos_usd


@dataclass(frozen=True, kw_only=True)
class Balances:
    """What stands on the accounts that limit spending."""

    prepaid_nanos_usd: int = 0
    held_nanos_usd: int = 0
    receivable_nanos_usd: int = 0

    @property
    def available_nanos_usd(self) -> int:
        """Prepaid less what is owed for usage that was served; never negative."""
        return max(0, self.prepaid_nanos_usd + self.receivable_nanos_usd)

    def beside(self, leased_nanos_usd: int) -> "Balances":
        """What stands there for everybody but the calls that this much is leased to."""
        return replace(self, prepaid_nanos_usd=self.prepaid_nanos_usd - leased_nanos_usd)

    @property
    def owed_nanos_usd(self) -> int:
        """Usage that prepaid credit does not cover; the next top-up or release pays it first."""
        return max(0, -self.prepaid_nanos_usd - self.receivable_nanos_usd)


@dataclass(frozen=True, kw_only=True)
class Posting:
    account: Account
    amount_nanos_usd: int


@dataclass(frozen=True, kw_only=True)
class Transaction:
    """`id` follows from the work and `transaction_time` from its event, so a replay writes the same bytes."""

    id: uuid.UUID
    kind: TransactionKind
    organization_id: str
    resource: str
    price_book_version: str
    transaction_time: datetime
    postings: tuple[Posting, ...]

    def __post_init__(self) -> None:
        assert len(self.postings) >= 2
        assert sum(posting.amount_nanos_usd for posting in self.postings) == 0
        assert all(posting.amount_nanos_usd for posting in self.postings)
        assert len({posting.account for posting in self.postings}) == len(self.postings)


def after(balances: Balances, entries: Iterable[Transaction]) -> Balances:
    """The balances once the entries of one organization are posted."""
    moved = {Account.PREPAID: 0, Account.HELD: 0, Account.RECEIVABLE: 0}
    for entry in entries:
        for posting in entry.postings:
            if posting.account in moved:
                moved[posting.account] += posting.amount_nanos_usd
    return Balances(
        prepaid_nanos_usd=balances.prepaid_nanos_usd + moved[Account.PREPAID],
        held_nanos_usd=balances.held_nanos_usd + moved[Account.HELD],
        receivable_nanos_usd=balances.receivable_nanos_usd + moved[Account.RECEIVABLE],
    )


def top_up(*, organization_id: str, amount_nanos_usd: int, request_id: str, now: datetime) -> Transaction:
    return Transaction(
        id=transaction_id(TransactionKind.TOP_UP, organization_id, request_id),
        kind=TransactionKind.TOP_UP,
        organization_id=organization_id,
        resource=f"organizations/{organization_id}",
        price_book_version="",
        transaction_time=now,
        postings=_postings({Account.FUNDING: -amount_nanos_usd, Account.PREPAID: amount_nanos_usd}),
    )


def hold(
    balances: Balances,
    *,
    organization_id: str,
    resource: str,
    amount_nanos_usd: int,
    price_book_version: str,
    now: datetime,
) -> Transaction | None:
    """Moves the amount out of reach of other spending; None when it is zero.

    Raises BalanceInsufficient when it is not there.
    """
    available = balances.available_nanos_usd
    if amount_nanos_usd > available:
        raise BalanceInsufficient(required_nanos_usd=amount_nanos_usd, available_nanos_usd=available)
    if amount_nanos_usd == 0:
        return None
    return Transaction(
        id=transaction_id(TransactionKind.HOLD, resource),
        kind=TransactionKind.HOLD,
        organization_id=organization_id,
        resource=resource,
        price_book_version=price_book_version,
        transaction_time=now,
        postings=_postings({Account.PREPAID: -amount_nanos_usd, Account.HELD: amount_nanos_usd}),
    )


def settle(
    *,
    organization_id: str,
    resource: str,
    held_nanos_usd: int,
    charge_nanos_usd: int,
    price_book_version: str,
    end_time: datetime,
) -> Transaction | None:
    """Ends a hold: the charge is earned and the rest is free again; None when nothing was held."""
    assert 0 <= charge_nanos_usd <= held_nanos_usd
    return _end_hold(
        TransactionKind.SETTLEMENT,
        organization_id,
        resource,
        held_nanos_usd,
        charge_nanos_usd,
        price_book_version,
        end_time,
    )


def release(
    *, organization_id: str, resource: str, held_nanos_usd: int, price_book_version: str, now: datetime
) -> Transaction | None:
    """Ends the hold of a job that never ran; None when nothing was held."""
    return _end_hold(TransactionKind.RELEASE, organization_id, resource, held_nanos_usd, 0, price_book_version, now)


def usage_charge(
    kind: TransactionKind,
    *,
    organization_id: str,
    project_id: str,
    resource: str,
    work_keys: Sequence[str],
    amount_nanos_usd: int,
    price_book_version: str,
    usage_time: datetime,
) -> Transaction | None:
    """What was served is owed: it lowers what is available at once, and below that it stays owed.

    One entry may stand for many pieces of work; `usage_time` is then that of the last one.

    Drawing on the prepaid account here would split the records at the moment when credit ends, and a shuffled stream
    would split others: then a replay could not give the same ledger.
    """
    if amount_nanos_usd == 0:
        return None
    return Transaction(
        id=transaction_id(kind, project_id, *work_keys),
        kind=kind,
        organization_id=organization_id,
        resource=resource,
        price_book_version=price_book_version,
        transaction_time=usage_time,
        postings=_postings({Account.RECEIVABLE: -amount_nanos_usd, Account.REVENUE: amount_nanos_usd}),
    )


def credit_note(
    *, organization_id: str, request_id: str, amount_nanos_usd: int, resource: str, now: datetime
) -> Transaction:
    """Gives back what was earned: it can be spent at once, and what is owed stays owed."""
    return Transaction(
        id=transaction_id(TransactionKind.CREDIT_NOTE, organization_id, request_id),
        kind=TransactionKind.CREDIT_NOTE,
        organization_id=organization_id,
        resource=resource or f"organizations/{organization_id}",
        price_book_version="",
        transaction_time=now,
        postings=_postings({Account.REVENUE: -amount_nanos_usd, Account.PREPAID: amount_nanos_usd}),
    )


def _end_hold(
    kind: TransactionKind,
    organization_id: str,
    resource: str,
    held_nanos_usd: int,
    charge_nanos_usd: int,
    price_book_version: str,
    moment: datetime,
) -> Transaction | None:
    if held_nanos_usd == 0:
        return None
    return Transaction(
        id=transaction_id(kind, resource),
        kind=kind,
        organization_id=organization_id,
        resource=resource,
        price_book_version=price_book_version,
        transaction_time=moment,
        postings=_postings(
            {
                Account.HELD: -held_nanos_usd,
                Account.REVENUE: charge_nanos_usd,
                Account.PREPAID: held_nanos_usd - charge_nanos_usd,
            }
        ),
    )


def _postings(amounts: Mapping[Account, int]) -> tuple[Posting, ...]:
    """In the order of the accounts' names, without those that do not change."""
    return tuple(
        Posting(account=account, amount_nanos_usd=amounts[account]) for account in sorted(amounts) if amounts[account]
    )
