"""What holds for every rule that a book may contain: the quote is the bill, a part is never dearer than the whole, and
how usage is cut into records changes nothing."""

from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.billing.holds import settlement
from services.billing.holds.settlement import OWED, Ending, Owes, Settlement
from services.billing.prices.pricing import (
    COMPLETED,
    OWING_ENDINGS,
    Metered,
    Price,
    RuleTerm,
    TuningRule,
    Work,
    price_metered,
    quote,
    record_amount,
    terms_of_metered,
    terms_of_whole,
)

USD = 10**9

works = st.builds(
    Work,
    base_model=st.just("any/model"),
    method=st.just("sft_lora"),
    training_tokens=st.integers(1, 10**12),
    validation_tokens=st.integers(0, 10**12),
    epochs=st.integers(1, 100),
    evaluations=st.integers(0, 100),
)
training_terms = st.sampled_from([(), ("epochs",)]).map(
    lambda times: RuleTerm(description="training", tokens="training_tokens", times=times)
)
validation_terms = st.sampled_from([(), ("epochs",), ("evaluations",), ("epochs", "evaluations")]).map(
    lambda times: RuleTerm(description="validation", tokens="validation_tokens", times=times)
)
endings = st.sets(st.sampled_from(OWING_ENDINGS)).map(frozenset)
rules = st.builds(
    TuningRule,
    terms=st.one_of(st.tuples(training_terms), st.tuples(training_terms, validation_terms)),
    base_fee_nanos_usd=st.integers(0, 10**10),
    minimum_nanos_usd=st.integers(0, 10**10),
    base_fee_applies_to=endings,
    minimum_applies_to=endings,
)
# Odd rates and counts meet every way of rounding.
rates = st.integers(0, 10**12)
owing = st.sampled_from([ending for ending in Ending if OWED[ending] is not Owes.NOTHING])


def whole(work: Work) -> Metered:
    return Metered(
        training_tokens=work.training_tokens * work.epochs,
        validation_tokens=work.validation_tokens * work.epochs * work.evaluations,
    )


@st.composite
def parts(draw: st.DrawFn, work: Work) -> Metered:
    most = whole(work)
    return Metered(
        training_tokens=draw(st.integers(0, most.training_tokens)),
        validation_tokens=draw(st.integers(0, most.validation_tokens)),
    )


def settle(rule: TuningRule, rate: int, work: Work, metered: Metered, ending: Ending) -> Settlement:
    held = quote(rule, rate, work).total_nanos_usd
    return settlement.settle(
        ending=ending, held_nanos_usd=held, rule=rule, nanos_usd_per_million=rate, work=work, metered=metered
    )


@given(rules, rates, works)
def test_a_completed_job_is_charged_its_quote_to_the_nano_dollar(rule: TuningRule, rate: int, work: Work) -> None:
    done = settle(rule, rate, work, whole(work), Ending.COMPLETED)
    assert done.charge_nanos_usd == quote(rule, rate, work).total_nanos_usd
    assert done.price == quote(rule, rate, work)
    assert done.discrepancy == ""


@given(rules, rates, works, owing, st.data())
def test_no_ending_of_honest_work_charges_more_than_the_quote_or_contradicts_it(
    rule: TuningRule, rate: int, work: Work, ending: Ending, data: st.DataObject
) -> None:
    metered = data.draw(parts(work)) if ending is not Ending.COMPLETED else whole(work)
    done = settle(rule, rate, work, metered, ending)
    assert 0 <= done.charge_nanos_usd <= quote(rule, rate, work).total_nanos_usd
    assert done.discrepancy == ""


@given(rules, rates, works, owing, st.data())
def test_more_finished_work_never_costs_less(
    rule: TuningRule, rate: int, work: Work, ending: Ending, data: st.DataObject
) -> None:
    more = data.draw(parts(work))
    less = Metered(
        training_tokens=data.draw(st.integers(0, more.training_tokens)),
        validation_tokens=data.draw(st.integers(0, more.validation_tokens)),
    )
    dear, cheap = (settle(rule, rate, work, metered, ending).charge_nanos_usd for metered in (more, less))
    assert cheap <= dear


@given(rules, rates, works, st.data())
def test_each_term_of_a_part_is_at_most_that_of_the_whole(
    rule: TuningRule, rate: int, work: Work, data: st.DataObject
) -> None:
    done = terms_of_metered(rule, rate, work, data.draw(parts(work)))
    for part, term in zip(done, terms_of_whole(rule, rate, work), strict=True):
        assert part.amount_nanos_usd <= term.amount_nanos_usd
        assert part.quantity <= term.quantity


@given(rules, rates, works, owing, st.data())
def test_cutting_usage_into_other_ranges_changes_the_settlement_by_nothing(
    rule: TuningRule, rate: int, work: Work, ending: Ending, data: st.DataObject
) -> None:
    metered = data.draw(parts(work))
    cuts = sorted(data.draw(st.lists(st.integers(0, metered.training_tokens), max_size=20)))
    ranges = [end - start for start, end in pairwise([0, *cuts, metered.training_tokens])]
    again = Metered(training_tokens=list(accumulate(ranges))[-1], validation_tokens=metered.validation_tokens)
    assert settle(rule, rate, work, again, ending) == settle(rule, rate, work, metered, ending)
    # What the records show sums to what is settled, but for half a nano-dollar each.
    shown = sum(record_amount(rule, rate, work, "training_tokens", tokens) for tokens in ranges)
    settled = sum(term.amount_nanos_usd for term in terms_of_metered(rule, rate, work, metered)[:1])
    assert 2 * abs(shown - settled) <= len(ranges) + 1


@given(rules, rates, works, st.integers(1, 50))
def test_double_the_epochs_is_double_the_work(rule: TuningRule, rate: int, work: Work, factor: int) -> None:
    """A term that bills epochs grows with them; one that leaves them out stays; nothing else moves."""
    longer = Work(**{**vars(work), "epochs": work.epochs * factor})
    for term, before, after in zip(
        rule.terms, terms_of_whole(rule, rate, work), terms_of_whole(rule, rate, longer), strict=True
    ):
        grown = factor if "epochs" in term.times else 1
        assert after.quantity == before.quantity * grown
        assert abs(after.amount_nanos_usd - before.amount_nanos_usd * grown) <= grown


@given(rules, rates, works)
def test_a_quote_is_its_terms_lifted_to_the_minimum_where_it_applies(rule: TuningRule, rate: int, work: Work) -> None:
    price = quote(rule, rate, work)
    tokens = sum(term.amount_nanos_usd for term in terms_of_whole(rule, rate, work))
    fee = rule.base_fee_nanos_usd if COMPLETED in rule.base_fee_applies_to else 0
    minimum = rule.minimum_nanos_usd if COMPLETED in rule.minimum_applies_to else 0
    assert price.total_nanos_usd == max(tokens + fee, minimum)
    assert price.minimum_applied == (tokens + fee < minimum)


TERMS = (RuleTerm(description="training", tokens="training_tokens", times=("epochs",)),)
# A million tokens at a dollar: half of it done is 50 cents.
WORK = Work(base_model="m", method="sft_lora", training_tokens=10**6, validation_tokens=0, epochs=1, evaluations=0)
HALF = Metered(training_tokens=10**6 // 2)


def rule(base_fee: tuple[str, ...] = (), minimum: tuple[str, ...] = (), cents: int = 10) -> TuningRule:
    return TuningRule(
        terms=TERMS,
        base_fee_nanos_usd=cents * USD // 100,
        minimum_nanos_usd=80 * USD // 100,
        base_fee_applies_to=frozenset(base_fee),
        minimum_applies_to=frozenset(minimum),
    )


@pytest.mark.parametrize(
    ("used", "ending", "cents"),
    [
        (rule(), Ending.CANCELLED_RUNNING, 50),
        (rule(base_fee=("cancelled_running",)), Ending.CANCELLED_RUNNING, 60),
        (rule(base_fee=("completed",)), Ending.CANCELLED_RUNNING, 50),
        (rule(minimum=("user_failure",)), Ending.USER_FAILURE, 80),
        (rule(minimum=("user_failure",)), Ending.STOPPED_EARLY, 50),
        (rule(base_fee=("stopped_early",), minimum=("stopped_early",)), Ending.STOPPED_EARLY, 80),
        # A fee that completed jobs do not pay was not quoted, so it is paid as far as the hold goes.
        (rule(base_fee=("cancelled_running",), cents=70), Ending.CANCELLED_RUNNING, 100),
    ],
)
def test_fee_and_minimum_apply_to_the_endings_that_the_book_names(used: TuningRule, ending: Ending, cents: int) -> None:
    done = settle(used, USD, WORK, HALF, ending)
    assert done.charge_nanos_usd == cents * USD // 100
    assert done.discrepancy == ""


@pytest.mark.parametrize("ending", [Ending.STOPPED_EARLY, Ending.CANCELLED_RUNNING, Ending.USER_FAILURE])
def test_who_finished_nothing_owes_neither_fee_nor_minimum(ending: Ending) -> None:
    done = settle(rule(base_fee=OWING_ENDINGS, minimum=OWING_ENDINGS), USD, WORK, Metered(), ending)
    assert done == Settlement(charge_nanos_usd=0, price=Price(terms=()))


def test_more_than_all_of_the_work_contradicts_the_quote_even_below_a_minimum() -> None:
    used = rule(minimum=("completed",))
    small = Work(**{**vars(WORK), "training_tokens": 10**5})
    done = settle(used, USD, small, Metered(training_tokens=2 * 10**5), Ending.CANCELLED_RUNNING)
    assert done.charge_nanos_usd == 20 * USD // 100
    assert "only 100000000 were quoted" in done.discrepancy


def test_metering_nothing_bills_no_base_fee() -> None:
    assert price_metered(rule(base_fee=OWING_ENDINGS), USD, WORK, Metered()).total_nanos_usd == 0


def test_the_endings_that_a_book_can_name_are_those_that_owe_something() -> None:
    assert set(OWING_ENDINGS) == {ending for ending in Ending if OWED[ending] is not Owes.NOTHING}
