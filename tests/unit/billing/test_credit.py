"""Credit states: the table, and that every change is announced once with the next revision."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.billing.budgets.credit import BANDS, Credit, CreditState, change_of, state_of
from services.billing.ledger.entries import Balances

amounts = st.integers(min_value=0, max_value=10**18)
balances = st.builds(
    Balances, prepaid_nanos_usd=amounts, held_nanos_usd=amounts, receivable_nanos_usd=amounts.map(lambda value: -value)
)
states = st.sampled_from(CreditState)


def prepaid(amount: int, owed: int = 0) -> Balances:
    return Balances(prepaid_nanos_usd=amount, receivable_nanos_usd=-owed)


@pytest.mark.parametrize(
    ("available", "low_balance", "state"),
    [
        (prepaid(0), 0, CreditState.EXHAUSTED),
        (prepaid(0), 10, CreditState.EXHAUSTED),
        (prepaid(10, owed=10), 0, CreditState.EXHAUSTED),
        (prepaid(10, owed=11), 0, CreditState.EXHAUSTED),
        # What is held for jobs is not there to be spent.
        (Balances(held_nanos_usd=100), 0, CreditState.EXHAUSTED),
        (prepaid(1), 0, CreditState.SUFFICIENT),
        (prepaid(9), 10, CreditState.LOW),
        (prepaid(20, owed=11), 10, CreditState.LOW),
        (prepaid(10), 10, CreditState.SUFFICIENT),
    ],
)
def test_the_table(available: Balances, low_balance: int, state: CreditState) -> None:
    assert state_of(available, low_balance) is state


def test_every_state_has_one_row() -> None:
    assert sorted(band.state for band in BANDS) == sorted(CreditState)


@given(balances, amounts)
def test_exhausted_is_exactly_when_nothing_is_available(given_balances: Balances, low_balance: int) -> None:
    state = state_of(given_balances, low_balance)
    assert (state is CreditState.EXHAUSTED) == (given_balances.available_nanos_usd == 0)
    assert not (state is CreditState.SUFFICIENT and given_balances.available_nanos_usd < low_balance)


@given(balances, amounts, st.none() | states, st.integers(min_value=0, max_value=10**6))
def test_a_change_is_announced_once(
    given_balances: Balances, low_balance: int, known: CreditState | None, revision: int
) -> None:
    credit = Credit(
        organization_id="o",
        balances=given_balances,
        low_balance_nanos_usd=low_balance,
        state=known,
        revision=revision,
    )
    change = change_of(credit)
    assert (change is None) == (state_of(given_balances, low_balance) is known)
    if change is not None:
        assert (change.from_state, change.revision) == (known, revision + 1)
        after = Credit(
            organization_id="o",
            balances=given_balances,
            low_balance_nanos_usd=low_balance,
            state=change.to_state,
            revision=change.revision,
        )
        assert change_of(after) is None
