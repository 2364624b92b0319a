"""The ledger's decisions: sums, who may spend what, and what each ending of a job owes."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.billing.holds import settlement
from services.billing.holds.settlement import Ending
from services.billing.ledger import entries
from services.billing.ledger.derived_ids import hold_id, transaction_id
from services.billing.ledger.entries import Account, BalanceInsufficient, Balances, Transaction, TransactionKind
from services.billing.prices.pricing import Metered, RuleTerm, TuningRule, Work, quote

NOW = datetime(2026, 11, 23, 5, 0, tzinfo=UTC)
JOB = "projects/p/tuningJobs/ft-1"
USD = 10**9
RATE = 1000 * 10**6  # nano-dollars per million tokens: a thousand for each token
RULE = TuningRule(
    terms=(
        RuleTerm(description="training", tokens="training_tokens", times=("epochs",)),
        RuleTerm(description="validation", tokens="validation_tokens", times=("epochs", "evaluations")),
    ),
    base_fee_nanos_usd=0,
    minimum_nanos_usd=5 * USD,
)
BIG = Work(base_model="m", method="sft_lora", training_tokens=10**7, validation_tokens=10**5, epochs=2, evaluations=5)
BIG_DONE = Metered(training_tokens=2 * 10**7, validation_tokens=10**6)
SMALL = Work(base_model="m", method="sft_lora", training_tokens=1000, validation_tokens=0, epochs=1, evaluations=0)

amounts = st.integers(1, 10**18)


def moved(entry: Transaction | None) -> dict[Account, int]:
    assert entry is not None
    assert sum(posting.amount_nanos_usd for posting in entry.postings) == 0
    return {posting.account: posting.amount_nanos_usd for posting in entry.postings}


@given(amounts)
def test_a_top_up_moves_money_from_outside_to_prepaid(amount: int) -> None:
    entry = entries.top_up(organization_id="o", amount_nanos_usd=amount, request_id="r", now=NOW)
    assert moved(entry) == {Account.FUNDING: -amount, Account.PREPAID: amount}


@given(st.integers(0, 10**18), st.integers(-(10**18), 0), amounts)
def test_a_hold_takes_what_is_free_and_never_more(prepaid: int, receivable: int, amount: int) -> None:
    balances = Balances(prepaid_nanos_usd=prepaid, receivable_nanos_usd=receivable)
    if amount <= prepaid + receivable:
        entry = entries.hold(
            balances, organization_id="o", resource=JOB, amount_nanos_usd=amount, price_book_version="b", now=NOW
        )
        assert moved(entry) == {Account.PREPAID: -amount, Account.HELD: amount}
    else:
        with pytest.raises(BalanceInsufficient) as refused:
            entries.hold(
                balances, organization_id="o", resource=JOB, amount_nanos_usd=amount, price_book_version="b", now=NOW
            )
        assert refused.value.shortfall_nanos_usd == amount - max(0, prepaid + receivable) > 0


@given(st.integers(0, 10**18), st.integers(-(10**18), 0))
def test_free_and_owed_are_never_negative_and_never_both(prepaid: int, receivable: int) -> None:
    balances = Balances(prepaid_nanos_usd=prepaid, receivable_nanos_usd=receivable)
    assert balances.available_nanos_usd >= 0
    assert balances.owed_nanos_usd >= 0
    assert balances.available_nanos_usd == 0 or balances.owed_nanos_usd == 0
    assert balances.available_nanos_usd - balances.owed_nanos_usd == prepaid + receivable


@given(st.integers(0, 10**18), st.data())
def test_a_settlement_splits_the_hold_between_revenue_and_prepaid(held: int, data: st.DataObject) -> None:
    charge = data.draw(st.integers(0, held))
    entry = entries.settle(
        organization_id="o",
        resource=JOB,
        held_nanos_usd=held,
        charge_nanos_usd=charge,
        price_book_version="b",
        end_time=NOW,
    )
    if held == 0:
        assert entry is None
        return
    parts = moved(entry)
    assert parts[Account.HELD] == -held
    assert parts.get(Account.REVENUE, 0) == charge
    assert parts.get(Account.PREPAID, 0) == held - charge


def test_ids_follow_from_the_work() -> None:
    one = transaction_id(TransactionKind.SETTLEMENT, JOB)
    assert one == transaction_id(TransactionKind.SETTLEMENT, JOB)
    assert one != transaction_id(TransactionKind.HOLD, JOB)
    assert transaction_id(TransactionKind.TOP_UP, "a", "b-c") != transaction_id(TransactionKind.TOP_UP, "a-b", "c")
    assert hold_id(JOB) == hold_id(JOB) != hold_id(JOB + "2")


def settled(ending: Ending, work: Work, metered: Metered, held: int | None = None) -> settlement.Settlement:
    return settlement.settle(
        ending=ending,
        held_nanos_usd=quote(RULE, RATE, work).total_nanos_usd if held is None else held,
        rule=RULE,
        nanos_usd_per_million=RATE,
        work=work,
        metered=metered,
    )


def test_a_completed_job_pays_its_quote() -> None:
    assert settled(Ending.COMPLETED, BIG, BIG_DONE).charge_nanos_usd == 21 * USD
    assert settled(Ending.COMPLETED, BIG, BIG_DONE).discrepancy == ""


def test_a_small_completed_job_pays_the_minimum() -> None:
    done = settled(Ending.COMPLETED, SMALL, Metered(training_tokens=1000))
    assert done.charge_nanos_usd == 5 * USD
    assert done.price.minimum_applied
    assert done.discrepancy == ""


@pytest.mark.parametrize("ending", [Ending.STOPPED_EARLY, Ending.CANCELLED_RUNNING, Ending.USER_FAILURE])
def test_unfinished_work_pays_for_finished_steps_without_a_minimum(ending: Ending) -> None:
    assert settled(ending, SMALL, Metered(training_tokens=400)).charge_nanos_usd == 400_000
    part = Metered(training_tokens=10**6, validation_tokens=10**5)
    assert settled(ending, BIG, part).charge_nanos_usd == 1_100_000_000


@pytest.mark.parametrize("ending", [Ending.PLATFORM_FAILURE, Ending.REFUSED, Ending.CANCELLED_BEFORE_RUN])
def test_what_is_not_the_users_fault_costs_nothing(ending: Ending) -> None:
    assert settled(ending, BIG, BIG_DONE).charge_nanos_usd == 0
    assert not settlement.needs_all_usage(ending)


def test_more_work_than_quoted_is_flagged_and_charged_at_most_the_hold() -> None:
    over = settled(Ending.COMPLETED, BIG, Metered(training_tokens=3 * 10**7, validation_tokens=10**6))
    assert over.charge_nanos_usd == 21 * USD
    assert "was quoted" in over.discrepancy


def test_less_work_than_quoted_is_flagged_and_charged_as_done() -> None:
    under = settled(Ending.COMPLETED, BIG, Metered(training_tokens=10**7))
    assert under.charge_nanos_usd == 10 * USD
    assert under.discrepancy


@given(
    st.sampled_from(Ending),
    st.integers(0, 10**12),
    st.integers(0, 10**12),
    st.integers(0, 10**18),
)
def test_no_ending_charges_more_than_the_hold(ending: Ending, training: int, validation: int, held: int) -> None:
    done = settled(ending, BIG, Metered(training_tokens=training, validation_tokens=validation), held)
    assert 0 <= done.charge_nanos_usd <= held


def test_every_ending_has_its_row() -> None:
    assert set(settlement.OWED) == set(Ending)


@given(amounts)
def test_a_credit_note_gives_back_what_was_earned(amount: int) -> None:
    entry = entries.credit_note(organization_id="o", request_id="r", amount_nanos_usd=amount, resource=JOB, now=NOW)
    assert moved(entry) == {Account.REVENUE: -amount, Account.PREPAID: amount}
    assert entry.kind is TransactionKind.CREDIT_NOTE
    again = entries.credit_note(organization_id="o", request_id="r", amount_nanos_usd=1, resource="", now=NOW)
    assert again.id == entry.id
    other = entries.credit_note(organization_id="p", request_id="r", amount_nanos_usd=1, resource="", now=NOW)
    assert other.id != entry.id
