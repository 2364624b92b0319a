"""A price book that is wrong fails to load, and the message names the line."""

import re
from datetime import UTC, datetime

import pytest

from services.billing.bookfile import BookInvalid, read_book
from services.billing.pricebook import BookConflict, PriceBook, PriceUnknown, Shelf

GOOD = """\
book: test
version: test-1
effective_from: 2026-01-01
currency: USD
tuning:
  terms:
    - {description: Training, tokens: training_tokens, times: [epochs]}
  base_fee_usd: 0
  minimum_usd: 5.00
  rates:
    - {model: a/one, usd_per_million_tokens: {sft_lora: 1.00}}
    - {model: a/*, usd_per_million_tokens: {sft_lora: 2.00}}
    - {model: a/b-*, usd_per_million_tokens: {sft_lora: 3.00}}
    - {billions: [0, 16], usd_per_million_tokens: {sft_lora: 4.00}}
inference:
  - {model: "*", input_usd_per_million_tokens: 0.1, output_usd_per_million_tokens: 0.0375}
hosting:
  - {hardware_type: cpu, usd_per_device_hour: 0.06}
"""


def changed(old: str, new: str, text: str = GOOD) -> str:
    assert old in text
    return text.replace(old, new, 1)


def test_a_good_book_loads() -> None:
    book = read_book(GOOD, "test.yaml")
    assert book.tuning_rule.minimum_nanos_usd == 5 * 10**9
    assert book.inference_rate("x/y").output_nanos_usd_per_million == 37_500_000


@pytest.mark.parametrize(
    ("model", "parameter_count", "usd"),
    [
        ("a/one", 8 * 10**9, 1),
        ("a/two", 8 * 10**9, 2),
        ("a/b-2", 0, 3),
        ("c/d", 8 * 10**9, 4),
        ("c/d", 16_400_000_000, 4),
    ],
)
def test_an_id_wins_over_a_pattern_and_a_pattern_over_a_size(model: str, parameter_count: int, usd: int) -> None:
    assert read_book(GOOD, "test.yaml").tuning_rate(model, "sft_lora", parameter_count) == usd * 10**9


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        (changed("minimum_usd: 5.00", "minimum_usd: -5.00"), 9, "not negative"),
        (changed("minimum_usd: 5.00", "minimum_usd: 0.0000000001"), 9, "nine decimals"),
        (changed("minimum_usd: 5.00", "minimum_usd: lots"), 9, "lots"),
        (changed("minimum_usd: 5.00", "minimum_usd: .nan"), 9, "nan"),
        (changed("minimum_usd: 5.00", "minimum_usd: 99999999"), 9, "at most"),
        (changed("sft_lora: 1.00", "sft_lora: -1.00"), 11, "not negative"),
        (changed("sft_lora: 1.00", "sft_magic: 1.00"), 11, "sft_magic"),
        (changed("a/b-*", "a/*"), 13, "ambiguous"),
        (changed("model: a/b-*", "billions: [16, 20]"), 14, "ambiguous"),
        (changed("[0, 16]", "[16, 0]"), 14, "range"),
        (changed("[0, 16]", "[0.5, 16]"), 14, "whole number"),
        (changed("model: a/one, ", ""), 11, "exactly one of"),
        (changed("model: a/one", "model: a/one, billions: [1, 2]"), 11, "exactly one of"),
        (changed("model: a/one", "model: 'a one'"), 11, "no id"),
        (changed("model: a/b-*", "model: a/*-b*"), 13, "no pattern"),
        (changed("[epochs]", "[epochs, epochs]"), 7, "twice"),
        (changed("[epochs]", "[evaluations]"), 7, "not one of"),
        (changed("currency: USD", "currency: EUR"), 4, "EUR"),
        (changed("currency: USD", "currency: USD\ncurrency: USD"), 5, "given twice"),
        (changed("currency: USD", "currency: USD\ncolour: red"), 5, "not known"),
        (changed("effective_from: 2026-01-01", "effective_from: soon"), 3, "no date"),
        (changed("currency: USD", "currency: USD\neffective_until: 2025-01-01"), 5, "end after it begins"),
        (changed("currency: USD\n", ""), 1, "'currency' is missing"),
        (changed("[epochs]}", "[epochs]"), 8, "expected"),
        (changed("hardware_type: cpu", "hardware_type: cpu, usd_per_minute: 1"), 18, "not known"),
        ("- a list\n", 1, "mapping"),
        ("", 1, "empty"),
    ],
)
def test_a_wrong_book_fails_with_its_line(text: str, line: int, problem: str) -> None:
    with pytest.raises(BookInvalid, match=re.escape(problem)) as refused:
        read_book(text, "test.yaml")
    assert str(refused.value).startswith(f"test.yaml, line {line}: ")


def version(number: int, start: str, until: str | None = None) -> PriceBook:
    text = GOOD.replace("test-1", f"test-{number}").replace("2026-01-01", start)
    return read_book(text + (f"effective_until: {until}\n" if until else ""), "test.yaml")


def test_the_version_that_is_effective_prices_new_work() -> None:
    shelf = Shelf([version(1, "2026-01-01", "2026-07-01"), version(2, "2026-07-01")], current="test")
    assert shelf.at(datetime(2026, 6, 30, 23, 59, tzinfo=UTC)).version == "test-1"
    assert shelf.at(datetime(2026, 7, 1, tzinfo=UTC)).version == "test-2"
    with pytest.raises(PriceUnknown, match="effective at 2025"):
        shelf.at(datetime(2025, 1, 1, tzinfo=UTC))
    with pytest.raises(PriceUnknown, match="known are test-1, test-2"):
        shelf.version("test-3")


def test_versions_that_are_effective_together_are_refused() -> None:
    with pytest.raises(BookConflict, match="at the same time"):
        Shelf([version(1, "2026-01-01"), version(2, "2026-07-01")], current="test")
    with pytest.raises(BookConflict, match="exists twice"):
        Shelf([version(1, "2026-01-01", "2026-02-01"), version(1, "2026-03-01")], current="test")
    with pytest.raises(BookConflict, match="no version of the price book 'other'"):
        Shelf([version(1, "2026-01-01")], current="other")


def test_a_retired_version_settles_but_prices_nothing_new() -> None:
    shelf = Shelf([version(2, "2026-07-01")], current="test", retired=[version(1, "2026-01-01")])
    assert shelf.version("test-1").version == "test-1"
    with pytest.raises(PriceUnknown):
        shelf.at(datetime(2026, 2, 1, tzinfo=UTC))
