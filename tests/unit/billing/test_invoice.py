"""Invoices: months, lines rounded once, totals that are the sum of their lines."""

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from services.billing.invoice import Charge, LineKind, Month, build
from services.billing.pricing import NANOS_USD_PER_CENT, round_to_cent

NOW = datetime(2026, 11, 23, tzinfo=UTC)


def charge(kind: LineKind, resource: str, amount: int, **more: object) -> Charge:
    given_fields: dict[str, object] = {
        "kind": kind,
        "resource": resource,
        "model": "m",
        "quantity": 1,
        "unit_price_nanos_usd": 1,
        "amount_nanos_usd": amount,
        "price_book_version": "b",
        "usage_records": (),
        "usage_record_count": 1,
    }
    return Charge(**{**given_fields, **more})  # type: ignore[arg-type]


def test_months() -> None:
    december = Month.parse("2026-12")
    assert december is not None
    assert (december.start, december.end) == (datetime(2026, 12, 1, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC))
    assert str(Month.of(december.end - timedelta(microseconds=1))) == "2026-12"
    assert [Month.parse(text) for text in ("2026-13", "2026-1", "1999-01", "", "2026-11 ")] == [None] * 5


def test_lines_are_in_a_fixed_order_and_say_what_they_are() -> None:
    invoice = build(
        organization_id="o",
        month=Month.of(NOW),
        now=NOW,
        charges=[
            charge(LineKind.INFERENCE, "acme/bot", 10**7),
            charge(LineKind.ENDPOINT, "projects/p/endpoints/ep_1", 10**7),
            charge(LineKind.TUNING, "projects/p/tuningJobs/ft-2", 5 * 10**9, minimum_applied=True),
            charge(LineKind.TUNING, "projects/p/tuningJobs/ft-1", 366 * 10**9),
        ],
    )
    assert [line.description for line in invoice.lines] == [
        "Tuning of m, job ft-1",
        "Tuning of m, job ft-2, minimum per completed job",
        "Dedicated endpoint ep_1, device minutes on m",
        "Tokens served by acme/bot",
    ]
    assert [line.unit for line in invoice.lines] == ["tokens", "tokens", "minutes", "tokens"]
    assert invoice.open
    assert invoice.total_nanos_usd == 371_020_000_000


@given(st.lists(st.integers(0, 10**15), max_size=30))
def test_each_line_is_rounded_once_to_the_cent(amounts: list[int]) -> None:
    charges = [charge(LineKind.INFERENCE, f"m{index}", amount) for index, amount in enumerate(amounts)]
    invoice = build(organization_id="o", month=Month(year=2026, month=10), charges=charges, now=NOW)
    assert invoice.total_nanos_usd == sum(round_to_cent(amount) for amount in amounts)
    assert all(line.amount_nanos_usd % NANOS_USD_PER_CENT == 0 for line in invoice.lines)
    assert all(
        abs(line.amount_nanos_usd - line.charge.amount_nanos_usd) * 2 <= NANOS_USD_PER_CENT for line in invoice.lines
    )
    assert not invoice.open


def test_half_a_cent_goes_to_the_even_cent() -> None:
    assert round_to_cent(5_000_000) == 0
    assert round_to_cent(15_000_000) == 2 * NANOS_USD_PER_CENT
    assert round_to_cent(25_000_000) == 2 * NANOS_USD_PER_CENT
