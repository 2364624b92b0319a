"""The arithmetic of a lease: whatever calls reserve, use and give back, they never cost more than was granted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.billing.prices.pricing import token_amount
from services.inference.spending.lease_account import LeaseAccount, Spender
from services.inference.spending.refusals import in_dollars
from services.inference.spending.token_price import TokenPrice

SPENDER = Spender("org", "proj", "key")
amounts = st.integers(0, 10**12)
# What happens to a lease: a grant of a total, a reservation, a settlement of the oldest one by a share, a return.
steps = st.lists(
    st.one_of(
        st.tuples(st.just("grow"), amounts),
        st.tuples(st.just("reserve"), amounts),
        st.tuples(st.just("settle"), st.integers(0, 100)),
        st.tuples(st.just("shrink"), st.just(0)),
    ),
    max_size=60,
)


@given(steps)
def test_what_is_used_and_reserved_was_granted(found: list[tuple[str, int]]) -> None:
    account = LeaseAccount(lease_id="l", spender=SPENDER)
    open_calls: list[int] = []
    most_granted = 0
    for step, value in found:
        if step == "grow":
            account.grow(value, beyond=account.total_with(0))
            most_granted = max(most_granted, account.granted)
        elif step == "reserve":
            fits = value <= account.free
            assert account.reserve(value) == fits
            open_calls += [value] * fits
        elif step == "settle" and open_calls:
            reserved = open_calls.pop(0)
            free = account.free
            account.settle(reserved, reserved * value // 100)
            assert account.free == free + reserved - reserved * value // 100
        elif step == "shrink":
            assert account.shrink() == account.used + account.reserved
            assert account.free == 0
        assert account.free >= 0
        assert account.reserved == sum(open_calls)
        assert account.used + account.reserved <= account.granted <= most_granted


def test_a_lease_that_is_over_gives_nothing_more() -> None:
    account = LeaseAccount(lease_id="l", spender=SPENDER)
    account.grow(100, beyond=0)
    assert account.reserve(40)
    account.over = True
    assert not account.reserve(1)
    account.settle(40, 10)
    assert account.free == 0


def test_a_lease_runs_low_before_it_is_empty() -> None:
    account = LeaseAccount(lease_id="l", spender=SPENDER)
    account.grow(1000, beyond=200)
    assert account.reserve(700)
    assert not account.runs_low
    assert account.reserve(101)
    assert account.runs_low


parts = st.lists(st.tuples(st.integers(0, 10**7), st.integers(0, 10**7)), max_size=20)


@given(parts, st.integers(0, 10**12), st.integers(0, 10**12))
def test_billing_never_books_more_than_was_reserved(
    found: list[tuple[int, int]], input_rate: int, output_rate: int
) -> None:
    """However a call is cut into parts, each of which billing rounds on its own."""
    price = TokenPrice.of_million(input_rate, output_rate)
    booked = sum(token_amount(read, input_rate) + token_amount(written, output_rate) for read, written in found)
    assert booked <= price.of(sum(read for read, _ in found), sum(written for _, written in found))


@pytest.mark.parametrize(("nanos", "text"), [(5 * 10**9, "5.00"), (6100, "0.0000061"), (0, "0.00")])
def test_amounts_are_exact(nanos: int, text: str) -> None:
    assert in_dollars(nanos) == text
