"""Spend caps: what fits, which shares are reached, and when a reached cap has to be announced."""

import dataclasses
from datetime import UTC, date, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.billing.budgets.caps import (
    ALERT_PERCENTS_DEFAULT,
    Budget,
    CapExceeded,
    cap_state_changed,
    check,
    percents_problem,
    percents_reached,
)

NOVEMBER, DECEMBER = date(2026, 11, 1), date(2026, 12, 1)
amounts = st.integers(min_value=0, max_value=10**18)


def budget(**changes: Any) -> Budget:
    given_values: dict[str, Any] = {
        "organization_id": "o",
        "project_id": "p",
        "api_key_id": "",
        "monthly_cap_nanos_usd": 100,
        "alert_percents": ALERT_PERCENTS_DEFAULT,
        "spent_nanos_usd": 0,
        "capped_month": None,
        "capped_at_nanos_usd": 0,
        "revision": 0,
        "update_time": datetime(2026, 11, 23, tzinfo=UTC),
    }
    return Budget(**(given_values | changes))


budgets = st.builds(
    budget,
    monthly_cap_nanos_usd=amounts,
    spent_nanos_usd=amounts,
    alert_percents=st.lists(st.integers(1, 100), unique=True, max_size=10).map(lambda found: tuple(sorted(found))),
)


def test_what_fits_to_the_last_nano_dollar() -> None:
    check([budget(spent_nanos_usd=60)], 40)
    with pytest.raises(CapExceeded) as refused:
        check([budget(spent_nanos_usd=60)], 41)
    assert (refused.value.required_nanos_usd, refused.value.budget.spent_nanos_usd) == (41, 60)


def test_the_tightest_of_several_caps_is_named() -> None:
    project, key = budget(monthly_cap_nanos_usd=1000), budget(api_key_id="key_1", spent_nanos_usd=95)
    with pytest.raises(CapExceeded) as refused:
        check([project, key], 10_000)
    assert refused.value.budget is key


def test_without_a_cap_everything_fits() -> None:
    check([], 10**18)
    check([budget(monthly_cap_nanos_usd=0, spent_nanos_usd=10**18)], 10**18)


@given(st.lists(budgets, max_size=5), amounts)
def test_a_hold_fits_when_it_fits_every_cap(found: list[Budget], required: int) -> None:
    fits = all(
        not each.monthly_cap_nanos_usd or each.spent_nanos_usd + required <= each.monthly_cap_nanos_usd
        for each in found
    )
    try:
        check(found, required)
    except CapExceeded:
        assert not fits
    else:
        assert fits


@pytest.mark.parametrize(
    ("spent", "reached"),
    [(0, ()), (49, ()), (50, (50,)), (79, (50,)), (80, (50, 80)), (100, (50, 80, 100)), (999, (50, 80, 100))],
)
def test_shares_of_a_cap(spent: int, reached: tuple[int, ...]) -> None:
    assert percents_reached(budget(spent_nanos_usd=spent)) == reached
    assert percents_reached(budget(monthly_cap_nanos_usd=0, spent_nanos_usd=spent)) == ()


@given(budgets, amounts)
def test_shares_only_grow_with_what_is_spent_and_all_are_reached_with_the_cap(first: Budget, more: int) -> None:
    later = dataclasses.replace(first, spent_nanos_usd=first.spent_nanos_usd + more)
    assert set(percents_reached(first)) <= set(percents_reached(later))
    if first.capped:
        assert percents_reached(first) == first.alert_percents


@pytest.mark.parametrize(
    ("spent", "cap", "announced", "month", "changed"),
    [
        (99, 100, None, NOVEMBER, False),
        (100, 100, None, NOVEMBER, True),
        (100, 100, (NOVEMBER, 100), NOVEMBER, False),
        # The cap was raised: over what is spent, or to another one that is reached.
        (100, 200, (NOVEMBER, 100), NOVEMBER, True),
        (500, 200, (NOVEMBER, 100), NOVEMBER, True),
        # Removed.
        (100, 0, (NOVEMBER, 100), NOVEMBER, True),
        # Another month: what was announced ended by itself, and the cap may be reached again.
        (10, 100, (NOVEMBER, 100), DECEMBER, False),
        (100, 100, (NOVEMBER, 100), DECEMBER, True),
    ],
)
def test_when_a_cap_is_announced(
    spent: int, cap: int, announced: tuple[date, int] | None, month: date, changed: bool
) -> None:
    capped_month, capped_at = announced or (None, 0)
    found = budget(
        spent_nanos_usd=spent, monthly_cap_nanos_usd=cap, capped_month=capped_month, capped_at_nanos_usd=capped_at
    )
    assert cap_state_changed(found, month) is changed


@pytest.mark.parametrize(
    ("percents", "fits"),
    [
        ([], True),
        ([100], True),
        (list(ALERT_PERCENTS_DEFAULT), True),
        (list(range(10, 101, 10)), True),
        (list(range(1, 12)), False),
        ([0], False),
        ([101], False),
        ([50, 50], False),
        ([80, 50], False),
    ],
)
def test_which_shares_can_be_asked_for(percents: list[int], fits: bool) -> None:
    assert (percents_problem(percents) == "") is fits
