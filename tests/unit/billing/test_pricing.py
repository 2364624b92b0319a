"""Prices of the real books: the worked examples to the cent, rates by size, and how amounts are rounded and written."""

from decimal import ROUND_HALF_EVEN, Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.billing.limits import Limits
from services.billing.prices.parse import read_book
from services.billing.prices.pricebook import PriceBook, price_job
from services.billing.prices.pricing import (
    NANOS_USD_PER_CENT,
    PriceUnknown,
    QuantityInvalid,
    Work,
    divide_half_even,
    in_dollars,
    round_to_cent,
)

BOOKS = Path(__file__).parents[3] / "services/billing/prices/books"
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


@pytest.mark.parametrize("version", ["default-2026-1", "default-2026-2"])
def test_worked_example_of_the_default_book(version: str) -> None:
    price = price_job(book(version), LLAMA, Limits())
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
    price = price_job(book("default-2026-2"), small, Limits())
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
        price_job(book("default-2026-2"), work, Limits())
    assert refused.value.field == field


def test_a_price_beyond_all_money_is_refused() -> None:
    work = Work(**{**vars(LLAMA), "training_tokens": 10**14, "epochs": 1000})
    with pytest.raises(QuantityInvalid, match="makes a price above"):
        price_job(book("default-2026-2"), work, Limits())


def test_a_device_minute_is_a_sixtieth_of_an_hour_rounded_half_to_even() -> None:
    default = book("default-2026-2")
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
