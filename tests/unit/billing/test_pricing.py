"""Prices: the worked examples to the cent, and the properties that make a quote the bill."""

from decimal import ROUND_HALF_EVEN, Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.billing.bookfile import read_book
from services.billing.pricebook import PriceBook, price_job
from services.billing.pricing import (
    NANOS_USD_PER_CENT,
    Limits,
    Metered,
    PriceUnknown,
    QuantityInvalid,
    RuleTerm,
    TuningRule,
    Work,
    divide_half_even,
    in_dollars,
    price_metered,
    quote,
    round_to_cent,
)

BOOKS = Path(__file__).parents[3] / "services/billing/books"
USD = 10**9

LLAMA = Work(
    base_model="meta-llama/Llama-3.1-8B",
    method="sft_lora",
    training_tokens=10_000_000,
    validation_tokens=1_000_000,
    epochs=3,
    evaluations=10,
)


def book(name: str) -> PriceBook:
    return read_book((BOOKS / f"{name}.yaml").read_text(encoding="utf-8"), name)


def test_worked_example_of_the_default_book() -> None:
    price = price_job(book("default"), LLAMA, Limits())
    assert price.total_nanos_usd == 366 * USD
    assert [term.quantity for term in price.terms] == [30_000_000, 30_000_000]
    assert not price.minimum_applied


def test_worked_example_of_the_together_book() -> None:
    assert price_job(book("together-2026"), LLAMA, Limits()).total_nanos_usd == 1920 * NANOS_USD_PER_CENT


@pytest.mark.parametrize(
    ("billions", "method", "usd_per_million"),
    [
        (16, "sft_lora", "0.48"),
        (16, "dpo_full", "1.35"),
        (17, "sft_full", "1.65"),
        (69, "dpo_full", "4.12"),
        (70, "sft_lora", "2.90"),
        (100, "dpo_lora", "7.25"),
    ],
)
def test_together_rates_by_size(billions: int, method: str, usd_per_million: str) -> None:
    rate = book("together-2026").tuning_rate("some/model", method, billions * 10**9)
    assert rate == int(Decimal(usd_per_million) * USD)


def test_sizes_outside_of_the_table_have_no_price() -> None:
    with pytest.raises(PriceUnknown, match="no price to tune"):
        book("together-2026").tuning_rate("some/model", "sft_lora", 101 * 10**9)
    with pytest.raises(PriceUnknown, match="parameter_count finds a price by size"):
        book("together-2026").tuning_rate("some/model", "sft_lora", 0)


def test_a_small_job_costs_the_minimum_and_its_terms_sum_to_it() -> None:
    small = Work(
        base_model="finemesh/demo-llama",
        method="sft_lora",
        training_tokens=100_000,
        validation_tokens=0,
        epochs=1,
        evaluations=0,
    )
    price = price_job(book("default"), small, Limits())
    assert price.total_nanos_usd == 5 * USD
    assert price.minimum_applied
    assert sum(term.amount_nanos_usd for term in price.terms) == 5 * USD


@pytest.mark.parametrize(
    ("field", "value"),
    [("training_tokens", 0), ("training_tokens", -1), ("validation_tokens", -1), ("epochs", 0), ("evaluations", 10**6)],
)
def test_counts_that_no_job_has_are_refused(field: str, value: int) -> None:
    work = Work(**{**vars(LLAMA), field: value})
    with pytest.raises(QuantityInvalid) as refused:
        price_job(book("default"), work, Limits())
    assert refused.value.field == field


def test_a_price_beyond_all_money_is_refused() -> None:
    work = Work(**{**vars(LLAMA), "training_tokens": 10**14, "epochs": 1000})
    with pytest.raises(QuantityInvalid, match="makes a price above"):
        price_job(book("default"), work, Limits())


def test_a_device_minute_is_a_sixtieth_of_an_hour_rounded_half_to_even() -> None:
    default = book("default")
    assert default.hosting_rate("nvidia-l40s-48gb").nanos_usd_per_device_minute == 24_833_333
    assert default.hosting_rate("nvidia-a100-80gb").nanos_usd_per_device_minute == 42_666_667
    assert default.hosting_rate("cpu").nanos_usd_per_device_minute == 1_000_000


@given(st.integers(0, 10**30), st.integers(1, 10**12))
def test_division_agrees_with_decimal_half_even(numerator: int, denominator: int) -> None:
    exact = Fraction(numerator, denominator)
    answer = divide_half_even(numerator, denominator)
    assert abs(exact - answer) <= Fraction(1, 2)
    if abs(exact - answer) == Fraction(1, 2):
        assert answer % 2 == 0


@given(st.integers(0, 10**18))
def test_cents_agree_with_decimal(nanos: int) -> None:
    cents = (Decimal(nanos) / NANOS_USD_PER_CENT).quantize(Decimal(1), rounding=ROUND_HALF_EVEN)
    assert round_to_cent(nanos) == int(cents) * NANOS_USD_PER_CENT


@given(st.integers(0, 10**18))
def test_dollars_in_words_are_exact(nanos: int) -> None:
    assert Decimal(in_dollars(nanos)) * USD == nanos


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
rules = st.builds(
    TuningRule,
    terms=st.tuples(training_terms, validation_terms),
    base_fee_nanos_usd=st.integers(0, 10**10),
    minimum_nanos_usd=st.integers(0, 10**10),
)


@given(rules, st.integers(0, 10**12), works)
def test_whole_work_metered_costs_its_quote(rule: TuningRule, rate: int, work: Work) -> None:
    if work.evaluations == 0:
        # Nothing is evaluated, so a rule that leaves the factor out would bill what is not done.
        work = Work(**{**vars(work), "validation_tokens": 0})
    metered = Metered(
        training_tokens=work.training_tokens * work.epochs,
        validation_tokens=work.validation_tokens * work.epochs * work.evaluations,
    )
    done = price_metered(rule, rate, work, metered).total_nanos_usd
    assert max(done, rule.minimum_nanos_usd) == quote(rule, rate, work).total_nanos_usd


@given(rules, st.integers(0, 10**12), works, st.data())
def test_part_of_the_work_never_costs_more_than_the_quote(
    rule: TuningRule, rate: int, work: Work, data: st.DataObject
) -> None:
    metered = Metered(
        training_tokens=data.draw(st.integers(0, work.training_tokens * work.epochs)),
        validation_tokens=data.draw(st.integers(0, work.validation_tokens * work.epochs * work.evaluations)),
    )
    assert price_metered(rule, rate, work, metered).total_nanos_usd <= quote(rule, rate, work).total_nanos_usd


def test_no_finished_step_owes_no_base_fee() -> None:
    rule = TuningRule(
        terms=(RuleTerm(description="training", tokens="training_tokens", times=("epochs",)),),
        base_fee_nanos_usd=USD,
        minimum_nanos_usd=0,
    )
    assert price_metered(rule, 10**9, LLAMA, Metered()).total_nanos_usd == 0
    assert price_metered(rule, 10**9, LLAMA, Metered(training_tokens=1)).total_nanos_usd == USD + 1000
