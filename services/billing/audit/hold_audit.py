"""Recomputes the ledger transactions of a job from its hold.

It takes rows and returns the first difference. What the hold ought to be is decided in `job_audit.py`.
"""

import uuid
from collections.abc import Sequence
from datetime import date, datetime
from typing import NamedTuple

from services.billing.audit.difference import Difference, difference, first_unequal
from services.billing.holds.hold import HoldState
from services.billing.ledger import entries
from services.billing.ledger.entries import Balances, Transaction
from services.billing.prices.pricing import Work

HOLDS = "holds"


class HoldRow(NamedTuple):
    """A hold as it is stored, with what is stored of the job's ending."""

    resource: str
    id: str
    organization_id: str
    project_id: str
    state: str
    base_model: str
    method: str
    training_tokens: int
    validation_tokens: int
    epochs: int
    evaluations: int
    parameter_count: int
    price_book_version: str
    held_nanos_usd: int
    charged_nanos_usd: int
    minimum_applied: bool
    billed_tokens: int
    adjustment_nanos_usd: int
    discrepancy: str
    hold_time: datetime
    end_time: datetime | None
    billing_month: date | None
    api_key_id: str
    ending: str | None
    usage_record_count: int | None
    ending_time: datetime | None
    ending_organization_id: str | None
    ending_project_id: str | None

    @property
    def location(self) -> str:
        return f"organizations/{self.organization_id} hold of {self.resource}"

    @property
    def work(self) -> Work:
        return Work(
            base_model=self.base_model,
            method=self.method,
            training_tokens=self.training_tokens,
            validation_tokens=self.validation_tokens,
            epochs=self.epochs,
            evaluations=self.evaluations,
            parameter_count=self.parameter_count,
        )


class JobEntryRow(NamedTuple):
    """A ledger transaction of a job."""

    resource: str
    organization_id: str
    position: int
    id: uuid.UUID
    kind: str
    price_book_version: str
    transaction_time: datetime
    accounts: Sequence[str]
    amounts: Sequence[int]

    @property
    def location(self) -> str:
        return f"organizations/{self.organization_id} transaction {self.position}"


def wrong_entries(hold: HoldRow, booked: Sequence[JobEntryRow]) -> Difference | None:
    expected = _expected_entries(hold)
    for wanted, found in zip(expected, booked, strict=False):
        moved = ", ".join(f"{each.account} {each.amount_nanos_usd}" for each in wanted.postings)
        pairs = (
            ("kind", wanted.kind.value, found.kind),
            ("postings", moved, ", ".join(f"{a} {n}" for a, n in zip(found.accounts, found.amounts, strict=True))),
            ("organization", wanted.organization_id, found.organization_id),
            ("price book", wanted.price_book_version, found.price_book_version),
            ("time", wanted.transaction_time.isoformat(), found.transaction_time.isoformat()),
            ("id", str(wanted.id), str(found.id)),
        )
        unequal = first_unequal(pairs)
        if unequal is not None:
            return difference(HOLDS, found.location, *unequal)
    if len(booked) > len(expected):
        extra = booked[len(expected)]
        return difference(HOLDS, extra.location, f"no such entry: the hold is {hold.state}", extra.kind)
    if len(booked) < len(expected):
        return of_hold(hold, f"a transaction {expected[len(booked)].kind}", None)
    return None


def _expected_entries(hold: HoldRow) -> list[Transaction]:
    amount = hold.held_nanos_usd
    of = {"organization_id": hold.organization_id, "resource": hold.resource}
    begun = entries.hold(
        Balances(prepaid_nanos_usd=amount),
        amount_nanos_usd=amount,
        price_book_version=hold.price_book_version,
        now=hold.hold_time,
        **of,
    )
    ended: Transaction | None = None
    if hold.state == HoldState.SETTLED and hold.end_time is not None:
        ended = entries.settle(
            held_nanos_usd=amount,
            charge_nanos_usd=hold.charged_nanos_usd,
            price_book_version=hold.price_book_version,
            end_time=hold.end_time,
            **of,
        )
    elif hold.state != HoldState.HELD and hold.end_time is not None:
        ended = entries.release(
            held_nanos_usd=amount, price_book_version=hold.price_book_version, now=hold.end_time, **of
        )
    return [entry for entry in (begun, ended) if entry is not None]


def of_hold(hold: HoldRow, expected: object, found: object) -> Difference:
    return difference(HOLDS, hold.location, expected, found)
