"""Credit notes on the real database: once per request, never more than was earned, and in line with the invoices."""

import asyncio
from datetime import UTC, date, datetime

import pytest

from chassis.db.pool import transaction
from chassis.errors import AlreadyExists, FailedPrecondition, OutOfRange
from services.billing.calendar import Month
from services.billing.config import BillingSettings
from services.billing.invoices import crediting, invoicing
from services.billing.invoices.crediting import Correction
from services.billing.invoices.invoice import CreditNote
from services.billing.invoices.store import InvoiceStore
from services.billing.ledger.derived_ids import transaction_id
from services.billing.ledger.entries import TransactionKind
from services.billing.limits import Limits
from tests.store.billing.world import USD, World, minute

NOVEMBER = Month(year=2026, month=11)
TERMS = BillingSettings().invoice_terms
LIMITS = Limits()
# What an hour of eight devices costs: 26.88 dollars.
HOUR = [minute("o", number, hardware="nvidia-h100-80gb", devices=8) for number in range(60)]
EARNED = 26_880_000_000


async def give_back(
    world: World, amount: int = USD, request_id: str = "r", limits: Limits = LIMITS, **changes: object
) -> CreditNote:
    fields: dict[str, object] = {
        "organization_id": "o",
        "request_id": request_id,
        "amount_nanos_usd": amount,
        "reason": "we were slow",
        "resource": "",
        "invoice": "",
        "month": None,
    }
    correction = Correction(**{**fields, **changes})  # type: ignore[arg-type]
    async with transaction(world.pool) as connection:
        return await crediting.give_back(connection, world.outbox, correction, now=world.clock.now(), limits=limits)


async def close(world: World, month: Month = NOVEMBER) -> None:
    async with transaction(world.pool) as connection:
        await invoicing.close(connection, world.outbox, TERMS, organization_id="o", month=month, now=world.clock.now())


async def test_a_credit_note_moves_what_was_earned_back_to_prepaid_once(world: World) -> None:
    await world.top_up("o", 30 * USD)
    await world.deliver(*HOUR)
    note = await give_back(world)
    assert await give_back(world) == note
    assert (note.number, note.billing_month) == (1, date(2026, 11, 1))
    assert note.transaction_id == transaction_id(TransactionKind.CREDIT_NOTE, "o", "r")
    balances = await world.balances("o")
    assert (balances["revenue"], balances["prepaid"]) == (EARNED - USD, 31 * USD)
    # What is owed stays owed; what is available rises by what was given back.
    assert balances["receivable"] == -EARNED
    for changes in ({"amount_nanos_usd": 2 * USD}, {"reason": "other"}, {"resource": "other"}):
        with pytest.raises(AlreadyExists, match="REQUEST_ID_REUSED"):
            await give_back(world, **changes)
    assert await world.pool.fetchval("SELECT count(*) FROM transactions WHERE kind = 'credit_note'") == 1


async def test_credit_that_is_used_makes_room_for_more(world: World) -> None:
    await world.top_up("o", 30 * USD)
    await world.deliver(*HOUR)
    with pytest.raises(OutOfRange, match="over its limit of 29999999999"):
        await give_back(world, EARNED, limits=Limits(amount_nanos_usd_max=30 * USD - 1))
    await give_back(world, EARNED, limits=Limits(amount_nanos_usd_max=30 * USD))


async def test_never_more_than_what_was_earned(world: World) -> None:
    await world.deliver(*HOUR)
    with pytest.raises(OutOfRange, match=r"at most the 26\.88 USD that were earned") as refused:
        await give_back(world, EARNED + 1)
    assert refused.value.metadata == {"earned_nanos_usd": str(EARNED), "required_nanos_usd": str(EARNED + 1)}
    assert [violation.field for violation in refused.value.violations] == ["amount_nanos_usd"]
    await give_back(world, EARNED)
    with pytest.raises(OutOfRange, match=r"at most the 0\.00 USD"):
        await give_back(world, 1, "second")
    with pytest.raises(OutOfRange):
        await give_back(world, 1, organization_id="nobody")
    # A refusal takes no number.
    await world.deliver(minute("o", 60))
    assert (await give_back(world, 1, "third")).number == 2


async def test_notes_that_race_for_the_last_of_it_do_not_both_get_it(world: World) -> None:
    await world.deliver(*HOUR)
    answers = await asyncio.gather(
        *(give_back(world, 10 * USD, f"r{number}") for number in range(8)), return_exceptions=True
    )
    given = [answer for answer in answers if isinstance(answer, CreditNote)]
    assert sorted(note.number for note in given) == [1, 2]
    assert all(isinstance(answer, OutOfRange) for answer in answers if not isinstance(answer, CreditNote))
    assert (await world.balances("o"))["revenue"] == EARNED - 20 * USD


async def test_a_note_is_a_line_below_zero_on_the_invoice_of_its_month(world: World) -> None:
    await world.deliver(*HOUR)
    await give_back(world, 1_005_000_000)
    await give_back(world, 1_000_000, "second")
    async with world.pool.acquire() as connection:
        invoice = await invoicing.read(connection, TERMS, "o", NOVEMBER)
    assert [(note.number, note.amount_nanos_usd) for note in invoice.credit_notes] == [
        ("CN-000001", 1_005_000_000),
        ("CN-000002", 1_000_000),
    ]
    # 26.88 less 1.006.
    assert (invoice.total_nanos_usd, invoice.rounding_nanos_usd) == (25_870_000_000, -4_000_000)
    assert {note.billing_month for note in invoice.credit_notes} == {"2026-11"}


async def test_a_note_after_the_close_corrects_the_closed_invoice_on_the_next_one(world: World) -> None:
    await world.deliver(*HOUR)
    name = "organizations/o/invoices/2026-11"
    with pytest.raises(FailedPrecondition, match="is not closed"):
        await give_back(world, invoice=name, month=NOVEMBER)
    world.clock.jump((datetime(2026, 12, 5, tzinfo=UTC) - world.clock.now()).total_seconds())
    await close(world)
    note = await give_back(world, invoice=name, month=NOVEMBER)
    assert note.billing_month == date(2026, 12, 1)
    async with world.pool.acquire() as connection:
        assert not (await invoicing.read(connection, TERMS, "o", NOVEMBER)).credit_notes
        december = await invoicing.read(connection, TERMS, "o", Month(year=2026, month=12))
        assert await InvoiceStore(connection).list_open_months("o", before=None, row_max=5) == [date(2026, 12, 1)]
    # A month that only gives back has a total below zero, and is closed like any other.
    assert (december.total_nanos_usd, december.total.units, december.total.nanos) == (-USD, -1, 0)
    world.clock.jump(40 * 86_400)
    await close(world, Month(year=2026, month=12))
    assert await world.pool.fetchval("SELECT total_nanos_usd FROM invoices WHERE number = 2") == -USD


async def test_an_invoice_is_given_back_once_whatever_the_request_ids(world: World) -> None:
    """Others have earned enough for a second refund; the invoice has nothing left to give back."""
    name = "organizations/o/invoices/2026-11"
    await world.deliver(*HOUR)
    world.clock.jump((datetime(2026, 12, 5, tzinfo=UTC) - world.clock.now()).total_seconds())
    await close(world)
    december = [minute("o", 60 * 24 * 10 + number, hardware="nvidia-h100-80gb", devices=8) for number in range(120)]
    await world.deliver(*december)
    with pytest.raises(OutOfRange, match=r"at most the 26\.88 USD that are left of organizations/o/invoices/2026-11"):
        await give_back(world, EARNED + 1, "too much", invoice=name, month=NOVEMBER)
    note = await give_back(world, EARNED - USD, "first", invoice=name, month=NOVEMBER)
    with pytest.raises(OutOfRange, match=r"at most the 1\.00 USD that are left") as refused:
        await give_back(world, EARNED - USD, "again", invoice=name, month=NOVEMBER)
    assert refused.value.metadata == {
        "invoice_total_nanos_usd": str(EARNED),
        "given_back_nanos_usd": str(EARNED - USD),
        "required_nanos_usd": str(EARNED - USD),
    }
    # The same request is the same note; what is left can be given back, and then nothing more.
    assert await give_back(world, EARNED - USD, "first", invoice=name, month=NOVEMBER) == note
    answers = await asyncio.gather(
        *(give_back(world, USD, f"r{number}", invoice=name, month=NOVEMBER) for number in range(4)),
        return_exceptions=True,
    )
    assert [type(answer) for answer in answers].count(CreditNote) == 1
    assert await world.pool.fetchval("SELECT sum(amount_nanos_usd)::bigint FROM credit_notes") == EARNED
    # What corrects no invoice is bounded by what was earned alone.
    await give_back(world, USD, "kindness")


async def test_a_chain_with_credit_notes_still_holds(world: World) -> None:
    await world.top_up("o", USD)
    await world.deliver(*HOUR[:5])
    await asyncio.gather(*(give_back(world, 1000, f"r{number}") for number in range(5)), world.top_up("o", 5, "x"))
    rows = await world.pool.fetch("SELECT position FROM transactions WHERE organization_id = 'o' ORDER BY position")
    assert [row["position"] for row in rows] == list(range(1, len(rows) + 1))
    notes = await world.pool.fetch("SELECT number FROM credit_notes ORDER BY number")
    assert [row["number"] for row in notes] == [1, 2, 3, 4, 5]
