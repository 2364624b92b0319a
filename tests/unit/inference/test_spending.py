"""The latest state counts, in whatever order states come, and an error says what to do about it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.inference.spending.states import (
    Capped,
    CapState,
    CreditState,
    NoCredit,
    SpendingStates,
    spending_error,
)

NOW = datetime(2026, 11, 23, tzinfo=UTC)
MONTH_END = datetime(2026, 12, 1, tzinfo=UTC)
STATES = ("SUFFICIENT", "LOW", "EXHAUSTED")


def credit(state: str, revision: int = 1) -> CreditState:
    return CreditState(organization_id="o", state=state, revision=revision)


def cap(capped: bool, *, key: str = "", revision: int = 1, project: str = "p") -> CapState:
    return CapState(
        project_id=project,
        api_key_id=key,
        capped=capped,
        until_time=MONTH_END,
        cap_nanos_usd=100 * 10**9,
        revision=revision,
    )


def problem(*states: CreditState | CapState, key: str = "k", now: datetime = NOW) -> NoCredit | Capped | None:
    spending = SpendingStates()
    spending.update(states)
    return spending.problem(organization_id="o", project_id="p", api_key_id=key, now=now)


@pytest.mark.parametrize(("state", "may_spend"), [("SUFFICIENT", True), ("LOW", True), ("EXHAUSTED", False)])
def test_only_exhausted_credit_stops(state: str, may_spend: bool) -> None:
    assert (problem(credit(state)) is None) == may_spend


def test_of_whom_nothing_is_known_may_spend() -> None:
    assert problem() is None
    assert problem(cap(True, project="another")) is None


def test_the_cap_of_the_project_stops_every_key_and_that_of_a_key_only_itself() -> None:
    assert isinstance(problem(cap(True)), Capped)
    assert isinstance(problem(cap(True), key=""), Capped)
    assert isinstance(problem(cap(True, key="k")), Capped)
    assert problem(cap(True, key="other")) is None
    assert problem(cap(True, key="k"), key="") is None


def test_a_cap_ends_with_its_month() -> None:
    assert isinstance(problem(cap(True), now=MONTH_END - timedelta(microseconds=1)), Capped)
    assert problem(cap(True), now=MONTH_END) is None


@given(st.permutations(list(enumerate(STATES * 3, start=1))), st.data())
def test_the_last_revision_counts_in_any_order_and_number(states: list[tuple[int, str]], data: st.DataObject) -> None:
    repeated = states + data.draw(st.lists(st.sampled_from(states)))
    assert isinstance(problem(*(credit(state, revision) for revision, state in repeated)), NoCredit)
    undone = [*repeated, (len(STATES) * 3 + 1, "LOW")]
    shuffled = data.draw(st.permutations(undone))
    assert problem(*(credit(state, revision) for revision, state in shuffled)) is None


def test_the_errors_say_what_to_do() -> None:
    empty, capped = spending_error(NoCredit()), spending_error(Capped(cap=cap(True, key="key_7")))
    assert (empty.reason, capped.reason) == ("BALANCE_INSUFFICIENT", "SPEND_CAP_EXCEEDED")
    assert "add credit" in empty.message
    assert "key_7" in capped.message
    assert "100.00 USD" in capped.message
    assert "2026-12-01" in capped.message
    assert capped.metadata["cap_nanos_usd"] == str(100 * 10**9)
