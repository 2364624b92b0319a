"""Gives money back by a credit note: a new entry, never a change of an old one. Not pure: database, bus.

It runs in the caller's transaction.
"""

import dataclasses
from datetime import datetime

from chassis.bus.outbox import Outbox
from chassis.db.pool import Connection
from chassis.errors import AlreadyExists, FailedPrecondition, FieldViolation, OutOfRange
from services.billing.budgets.review import review_spending
from services.billing.calendar import Month, billing_month
from services.billing.invoices.invoice import CreditNote
from services.billing.invoices.store import InvoiceStore
from services.billing.ledger import entries
from services.billing.ledger.store import LedgerStore
from services.billing.limits import Limits
from services.billing.prices.pricing import in_dollars


@dataclasses.dataclass(frozen=True, kw_only=True)
class Correction:
    """What an operator gives back and why. `invoice` is the name of the invoice that it corrects, `month` the month of
    that, or neither."""

    organization_id: str
    request_id: str
    amount_nanos_usd: int
    reason: str
    resource: str
    invoice: str
    month: Month | None


async def give_back(
    connection: Connection, outbox: Outbox, correction: Correction, *, now: datetime, limits: Limits
) -> CreditNote:
    """Books the credit note once per request id; the same id with other content is REQUEST_ID_REUSED."""
    ledger = LedgerStore(connection)
    invoices = InvoiceStore(connection)
    organization_id = correction.organization_id
    standings = await ledger.lock([organization_id])
    before = await invoices.get_credit_note(organization_id, correction.request_id)
    if before is not None:
        return _same(before, correction)
    await _refuse_more_than_invoiced(connection, correction)
    earned_nanos_usd = await ledger.get_revenue(organization_id)
    _refuse_more_than_earned(correction, earned_nanos_usd)
    balances = standings[organization_id].balances
    if (
        balances.available_nanos_usd + balances.held_nanos_usd + correction.amount_nanos_usd
        > limits.amount_nanos_usd_max
    ):
        raise _out_of_range(f"would lift the balance over its limit of {limits.amount_nanos_usd_max} nano-dollars", {})
    entry = entries.credit_note(
        organization_id=organization_id,
        request_id=correction.request_id,
        amount_nanos_usd=correction.amount_nanos_usd,
        resource=correction.resource,
        now=now,
    )
    closed = await ledger.closed_months([organization_id])
    note = CreditNote(
        number=await invoices.take_number("credit_note"),
        organization_id=organization_id,
        request_id=correction.request_id,
        amount_nanos_usd=correction.amount_nanos_usd,
        reason=correction.reason,
        resource=correction.resource,
        invoice=correction.invoice,
        transaction_id=entry.id,
        billing_month=billing_month(now, closed[organization_id], now),
        create_time=now,
    )
    await invoices.insert_credit_note(note)
    await ledger.post(standings, [entry])
    await review_spending(connection, outbox, [organization_id], now)
    return note


def _same(before: CreditNote, correction: Correction) -> CreditNote:
    if before.claim != (correction.amount_nanos_usd, correction.reason, correction.resource, correction.invoice):
        raise AlreadyExists(
            "REQUEST_ID_REUSED",
            f"request_id {correction.request_id} came before with other content; use a new one",
            violations=[FieldViolation("request_id", "was used for a different request")],
        )
    return before


async def _refuse_more_than_invoiced(connection: Connection, correction: Correction) -> None:
    """All notes of an invoice together come to its total at most, whatever their request ids are."""
    invoices = InvoiceStore(connection)
    if correction.month is None:
        return
    closed = await invoices.get_invoice(correction.organization_id, correction.month.first_day)
    if closed is None:
        raise FailedPrecondition(
            "STATE_CONFLICT", f"{correction.invoice} is not closed; leave `invoice` empty to correct what is still open"
        )
    given_nanos_usd = await invoices.get_given_back(correction.organization_id, correction.invoice)
    left_nanos_usd = max(0, closed.total_nanos_usd - given_nanos_usd)
    if correction.amount_nanos_usd <= left_nanos_usd:
        return
    raise _out_of_range(
        f"must be at most the {in_dollars(left_nanos_usd)} USD that are left of {correction.invoice}, not"
        f" {in_dollars(correction.amount_nanos_usd)}",
        {
            "invoice_total_nanos_usd": str(closed.total_nanos_usd),
            "given_back_nanos_usd": str(given_nanos_usd),
            "required_nanos_usd": str(correction.amount_nanos_usd),
        },
    )


def _refuse_more_than_earned(correction: Correction, earned_nanos_usd: int) -> None:
    if correction.amount_nanos_usd <= earned_nanos_usd:
        return
    raise _out_of_range(
        f"must be at most the {in_dollars(earned_nanos_usd)} USD that were earned from the organization, not"
        f" {in_dollars(correction.amount_nanos_usd)}",
        {"earned_nanos_usd": str(earned_nanos_usd), "required_nanos_usd": str(correction.amount_nanos_usd)},
    )


def _out_of_range(problem: str, metadata: dict[str, str]) -> OutOfRange:
    return OutOfRange(
        "INVALID_FIELD",
        f"amount_nanos_usd {problem}",
        violations=[FieldViolation("amount_nanos_usd", problem)],
        metadata=metadata,
    )
