"""Which month pays for what came late: never a closed one, and never an earlier one than its own."""

from datetime import UTC, date, datetime, timedelta, timezone

from hypothesis import given
from hypothesis import strategies as st

from services.billing.calendar import billing_month, first_of_month, next_month

NOW = datetime(2026, 11, 23, 5, 0, tzinfo=UTC)
OCTOBER, NOVEMBER, DECEMBER = date(2026, 10, 1), date(2026, 11, 1), date(2026, 12, 1)

moments = st.datetimes(datetime(2020, 1, 1), datetime(2035, 1, 1), timezones=st.just(UTC))
months = moments.map(first_of_month)


def test_usage_is_billed_in_its_own_month_while_that_is_open() -> None:
    assert billing_month(datetime(2026, 10, 31, 23, 59, tzinfo=UTC), frozenset(), NOW) == OCTOBER
    assert billing_month(NOW, frozenset({OCTOBER}), NOW) == NOVEMBER
    # A clock that is ahead, within what is allowed: the month is the one that the event tells.
    assert billing_month(datetime(2026, 12, 1, 0, 10, tzinfo=UTC), frozenset({OCTOBER}), NOW) == DECEMBER


def test_what_comes_after_the_close_is_billed_in_the_month_of_now() -> None:
    assert billing_month(datetime(2026, 10, 31, tzinfo=UTC), frozenset({OCTOBER}), NOW) == NOVEMBER
    assert billing_month(datetime(2026, 8, 1, tzinfo=UTC), frozenset({date(2026, 8, 1)}), NOW) == NOVEMBER
    # An earlier month that had no charges was never closed, so it is still open.
    assert billing_month(datetime(2026, 9, 1, tzinfo=UTC), frozenset({OCTOBER}), NOW) == date(2026, 9, 1)


def test_a_clock_that_is_behind_never_bills_a_closed_month() -> None:
    behind = datetime(2026, 10, 31, 23, 59, 59, tzinfo=UTC)
    assert billing_month(behind, frozenset({OCTOBER}), behind) == NOVEMBER
    assert billing_month(behind, frozenset({OCTOBER, NOVEMBER}), behind) == DECEMBER


def test_months_are_those_of_utc() -> None:
    assert first_of_month(datetime(2026, 11, 1, 0, 30, tzinfo=timezone(timedelta(hours=1)))) == OCTOBER
    assert next_month(DECEMBER) == date(2027, 1, 1)
    assert next_month(OCTOBER) == NOVEMBER


@given(moments, st.frozensets(months, max_size=30), moments)
def test_the_month_is_open_and_not_before_its_own(moment: datetime, closed: frozenset[date], now: datetime) -> None:
    month = billing_month(moment, closed, now)
    assert month.day == 1
    assert month not in closed
    assert month >= first_of_month(moment)
    if first_of_month(moment) not in closed:
        assert month == first_of_month(moment)
    else:
        assert month >= first_of_month(now)
