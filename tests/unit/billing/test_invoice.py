"""Invoices: months, exact lines, credit notes as lines below zero, and a total that is
rounded once."""

import uuid
from datetime import UTC, date, datetime, timedelta
from decimal import ROUND_HALF_EVEN, Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.billing.calendar import Month
from services.billing.invoices.invoice import (
    Charge,
    CreditNote,
    Invoice,
    LineKind,
    Rounding,
    build_lines,
    credit_note_number,
    invoice_number,
)
from services.billing.prices.pricing import NANOS_USD_PER_CENT, NANOS_USD_PER_USD, round_to_cent

NOW = datetime(2026, 11, 23, tzinfo=UTC)
OCTOBER = Month(year=2026, month=10)

amounts = st.integers(0, 10**15)


def charge(kind: LineKind, resource: str, amount: int, **more: object) -> Charge:
    given_fields: dict[str, object] = {
        "kind": kind,
        "project_id": "p",
        "resource": resource,
        "usage_kind": "output_tokens" if kind is LineKind.INFERENCE else "",
        "model": "m",
        "quantity": 1,
        "unit_price_nanos_usd": 1,
        "amount_nanos_usd": amount,
        "price_book_version": "b",
        "usage_record_count": 1,
    }
    return Charge(**{**given_fields, **more})  # type: ignore[arg-type]


def note(amount: int) -> CreditNote:
    return CreditNote(
        number=1,
        organization_id="o",
        request_id="r",
        amount_nanos_usd=amount,
        reason="because",
        resource="",
        invoice="",
        transaction_id=uuid.UUID(int=1),
        billing_month=date(2026, 10, 1),
        create_time=NOW,
    )


def test_months() -> None:
    december = Month.parse("2026-12")
    assert december is not None
    assert (december.start, december.end) == (datetime(2026, 12, 1, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC))
    assert Month.from_day(december.first_day) == december
    assert str(Month.of(december.end - timedelta(microseconds=1))) == "2026-12"
    assert [Month.parse(text) for text in ("2026-13", "2026-1", "1999-01", "", "2026-11 ")] == [None] * 5


def test_lines_are_in_a_fixed_order_and_say_what_they_are() -> None:
    charges = [
        charge(LineKind.INFERENCE, "acme/bot", 10**7),
        charge(LineKind.INFERENCE, "acme/bot", 10**7, usage_kind="input_tokens"),
        charge(LineKind.CLUSTER, "projects/p/clusters/cl_1", 10**7),
        charge(LineKind.ENDPOINT, "projects/p/endpoints/ep_1", 10**7),
        charge(LineKind.TUNING, "projects/p/tuningJobs/ft-2", 5 * 10**9),
        charge(LineKind.TUNING, "projects/p/tuningJobs/ft-1", 366 * 10**9),
    ]
    lines = build_lines(charges)
    assert [line.description for line in lines] == [
        "Tuning of m, job ft-1",
        "Tuning of m, job ft-2",
        "Dedicated endpoint ep_1, device minutes on m",
        "Cluster cl_1, node hours on m",
        "Input tokens served by acme/bot",
        "Output tokens served by acme/bot",
    ]
    assert [line.unit for line in lines] == ["tokens", "tokens", "minutes", "hours", "tokens", "tokens"]
    assert build_lines(reversed(charges)) == lines
    assert Invoice(organization_id="o", month=OCTOBER, lines=lines).total_nanos_usd == 371_040_000_000


@given(st.lists(amounts, max_size=30), st.lists(st.integers(1, 10**15), max_size=5))
def test_lines_are_exact_and_only_the_total_is_rounded(used: list[int], back: list[int]) -> None:
    lines = build_lines(charge(LineKind.INFERENCE, f"m{index:02d}", amount) for index, amount in enumerate(used))
    invoice = Invoice(
        organization_id="o", month=OCTOBER, lines=lines, credit_notes=tuple(note(amount) for amount in back)
    )
    assert [line.amount_nanos_usd for line in lines] == used
    debited = sum(used) - sum(back)
    assert Decimal(invoice.total_nanos_usd) / NANOS_USD_PER_USD == _cents(debited)
    assert invoice.total_nanos_usd == debited + invoice.rounding_nanos_usd
    assert abs(invoice.rounding_nanos_usd) <= NANOS_USD_PER_CENT // 2


@pytest.mark.parametrize(("each", "total"), [(4_900_000, 1_960_000_000), (5_100_000, 2_040_000_000)])
def test_many_lines_below_a_cent_come_to_what_was_debited(each: int, total: int) -> None:
    lines = build_lines(charge(LineKind.INFERENCE, f"m{number}", each) for number in range(400))
    assert Invoice(organization_id="o", month=OCTOBER, lines=lines).total_nanos_usd == total


@given(st.lists(amounts, max_size=30), st.lists(st.integers(1, 10**15), max_size=5))
def test_an_invoice_that_rounded_its_lines_is_rebuilt_like_that(used: list[int], back: list[int]) -> None:
    lines = build_lines(
        (charge(LineKind.INFERENCE, f"m{index:02d}", amount) for index, amount in enumerate(used)), Rounding.LINES
    )
    invoice = Invoice(
        organization_id="o",
        month=OCTOBER,
        lines=lines,
        credit_notes=tuple(note(amount) for amount in back),
        rounding=Rounding.LINES,
    )
    assert Decimal(invoice.total_nanos_usd) / NANOS_USD_PER_USD == sum(map(_cents, used)) - sum(map(_cents, back))
    assert invoice.rounding_nanos_usd == 0


def test_a_minimum_is_a_line_of_its_own_below_its_job() -> None:
    charges = [
        charge(LineKind.TUNING, "projects/p/tuningJobs/ft-2", 2 * 10**9),
        charge(
            LineKind.TUNING,
            "projects/p/tuningJobs/ft-1",
            5 * 10**9,
            minimum_applied=True,
            minimum_nanos_usd=4_987_800_000,
            usage_records=("r",),
        ),
    ]
    lines = build_lines(charges)
    assert [(line.charge.kind, line.description, line.unit, line.amount_nanos_usd) for line in lines] == [
        ("tuning", "Tuning of m, job ft-1", "tokens", 12_200_000),
        ("minimum", "Up to the minimum of a job, job ft-1", "", 4_987_800_000),
        ("tuning", "Tuning of m, job ft-2", "tokens", 2 * 10**9),
    ]
    minimum = lines[1].charge
    assert (minimum.quantity, minimum.unit_price_nanos_usd, minimum.usage_record_count, minimum.usage_records) == (
        0,
        0,
        0,
        (),
    )
    assert [line.amount_nanos_usd for line in build_lines(charges, Rounding.LINES)] == [5 * 10**9, 2 * 10**9]


def _cents(nanos_usd: int) -> Decimal:
    """The same rounding by another implementation."""
    return (Decimal(nanos_usd) / NANOS_USD_PER_USD).quantize(Decimal("0.01"), rounding=ROUND_HALF_EVEN)


def test_half_a_cent_goes_to_the_even_cent() -> None:
    assert round_to_cent(5_000_000) == 0
    assert round_to_cent(15_000_000) == 2 * NANOS_USD_PER_CENT
    assert round_to_cent(25_000_000) == 2 * NANOS_USD_PER_CENT


def test_an_invoice_is_open_until_it_has_a_close_time() -> None:
    assert Invoice(organization_id="o", month=OCTOBER, lines=()).open
    assert not Invoice(organization_id="o", month=OCTOBER, lines=(), number=1, close_time=NOW).open
    assert Invoice(organization_id="o", month=OCTOBER, lines=()).empty
    assert not Invoice(organization_id="o", month=OCTOBER, lines=(), credit_notes=(note(1),)).empty


def test_numbers_of_documents() -> None:
    assert (invoice_number(42), credit_note_number(7)) == ("FM-000042", "CN-000007")
    assert invoice_number(1_234_567) == "FM-1234567"
