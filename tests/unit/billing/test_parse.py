"""A price book that is wrong fails to load, and the message names the line."""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from services.billing.prices.catalogue import Catalogue
from services.billing.prices.parse import read_book
from services.billing.prices.pricebook import BookConflict, PriceBook
from services.billing.prices.pricing import OWING_ENDINGS, PriceUnknown
from services.billing.prices.yaml import BookInvalid
from tests.unit.billing.wrong_books import GOOD, GOOD_IN_FULL, WRONG, WrongBook

BOOKS = Path(__file__).parents[3] / "services/billing/prices/books"


def test_a_good_book_loads() -> None:
    book = read_book(GOOD, "test.yaml")
    assert book.tuning_rule.minimum_nanos_usd == 5 * 10**9
    assert book.inference_rate("x/y").output_nanos_usd_per_million == 37_500_000
    assert book.cluster_rate("h100-80gb").nanos_usd_per_node_hour == 26_880_000_000
    with pytest.raises(PriceUnknown, match="no price for cluster nodes of 'a100'"):
        book.cluster_rate("a100")


def test_what_fee_and_minimum_apply_to_is_written_or_the_usual() -> None:
    usual = read_book(GOOD, "test.yaml").tuning_rule
    assert usual.base_fee_applies_to == set(OWING_ENDINGS)
    assert usual.minimum_applies_to == {"completed"}
    written = read_book(GOOD_IN_FULL, "test.yaml").tuning_rule
    assert (written.base_fee_nanos_usd, written.minimum_nanos_usd) == (250_000_000, 5 * 10**9)
    assert written.base_fee_applies_to == {"completed", "user_failure"}
    assert written.minimum_applies_to == {"completed"}
    none = read_book(GOOD.replace("minimum_usd: 5.00", "minimum: {usd: 5.00, applies_to: []}"), "test.yaml").tuning_rule
    assert none.minimum_applies_to == set()


@pytest.mark.parametrize("path", sorted(BOOKS.glob("*.yaml")), ids=lambda path: path.name)
def test_a_books_file_is_named_by_its_version(path: Path) -> None:
    assert read_book(path.read_text(encoding="utf-8"), path.name).version == path.stem


def test_the_example_of_the_documentation_is_a_book() -> None:
    page = (BOOKS.parents[3] / "docs/price-books.md").read_text(encoding="utf-8")
    example = page.partition("```yaml\n")[2].partition("```")[0]
    book = read_book(example, "docs/price-books.md")
    assert [book.tuning_rate(model, "sft_lora", 0) // 10**7 for model in ("acme/reader", "acme/other")] == [610, 700]
    assert book.cluster_rate("nvidia-h100-80gb").nanos_usd_per_node_hour == 26_880_000_000


def test_the_next_version_of_the_default_book_changes_no_price() -> None:
    before, after = (
        read_book((BOOKS / f"default-2026-{number}.yaml").read_text(encoding="utf-8"), "") for number in (1, 2)
    )
    assert before.effective_until == after.effective_from
    for section in ("tuning_rule", "tuning_rates", "model_billions", "inference_rates", "hosting_rates"):
        assert getattr(before, section) == getattr(after, section)
    assert before.cluster_rates == ()


def test_the_version_with_feedback_changes_no_other_price() -> None:
    before, after = (
        read_book((BOOKS / f"default-2026-{number}.yaml").read_text(encoding="utf-8"), "") for number in (2, 3)
    )
    assert before.effective_until == after.effective_from
    for section in ("tuning_rule", "model_billions", "inference_rates", "hosting_rates", "cluster_rates"):
        assert getattr(before, section) == getattr(after, section)
    for old, new in zip(before.tuning_rates, after.tuning_rates, strict=True):
        added = {name: new.nanos_usd_per_million[name] for name in ("kto_lora", "kto_full")}
        assert (new.selector, new.nanos_usd_per_million) == (old.selector, {**old.nanos_usd_per_million, **added})
    with pytest.raises(PriceUnknown, match="default-2026-2 has no price to tune 'finemesh/demo-llama' with kto_lora"):
        before.tuning_rate("finemesh/demo-llama", "kto_lora", 0)
    assert after.cluster_rate("nvidia-h100-80gb").nanos_usd_per_node_hour == 26_880_000_000


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


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.problem)
def test_a_wrong_book_fails_with_its_line(wrong: WrongBook) -> None:
    with pytest.raises(BookInvalid, match=re.escape(wrong.problem)) as refused:
        read_book(wrong.text, "test.yaml")
    assert str(refused.value).startswith(f"test.yaml, line {wrong.line}: ")


def version(number: int, start: str, until: str | None = None) -> PriceBook:
    text = GOOD.replace("test-1", f"test-{number}").replace("2026-01-01", start)
    return read_book(text + (f"effective_until: {until}\n" if until else ""), f"test-{number}.yaml")


def test_the_version_that_is_effective_prices_new_work() -> None:
    catalogue = Catalogue([version(1, "2026-01-01", "2026-07-01"), version(2, "2026-07-01")], current="test")
    assert catalogue.at(datetime(2026, 6, 30, 23, 59, tzinfo=UTC)).version == "test-1"
    assert catalogue.at(datetime(2026, 7, 1, tzinfo=UTC)).version == "test-2"
    june, july = datetime(2026, 6, 30, 23, 30, tzinfo=UTC), datetime(2026, 7, 1, tzinfo=UTC)
    for end, versions in ((july, ["test-1"]), (july + timedelta(minutes=1), ["test-1", "test-2"])):
        assert [book.version for book in catalogue.within(june, end)] == versions
    assert [book.version for book in catalogue.within(july, july + timedelta(days=1))] == ["test-2"]
    with pytest.raises(PriceUnknown, match="effective at 2025"):
        catalogue.at(datetime(2025, 1, 1, tzinfo=UTC))
    with pytest.raises(PriceUnknown, match="known are test-1, test-2"):
        catalogue.version("test-3")


def test_versions_that_are_effective_together_are_refused() -> None:
    with pytest.raises(
        BookConflict, match=r"^test-2.yaml, line 3: .* at the same time \(the other: test-1.yaml, line 3"
    ):
        Catalogue([version(1, "2026-01-01"), version(2, "2026-07-01")], current="test")
    with pytest.raises(BookConflict, match="at the same time"):
        Catalogue([version(1, "2026-01-01", "2026-07-02"), version(2, "2026-07-01")], current="test")
    with pytest.raises(BookConflict, match=r"^test-1.yaml, line 2: .* exists twice \(the other: test-1.yaml, line 2"):
        Catalogue([version(1, "2026-01-01", "2026-02-01"), version(1, "2026-03-01")], current="test")
    with pytest.raises(BookConflict, match="no version of the price book 'other'"):
        Catalogue([version(1, "2026-01-01")], current="other")


def test_a_retired_version_settles_but_prices_nothing_new() -> None:
    catalogue = Catalogue([version(2, "2026-07-01")], current="test", retired=[version(1, "2026-01-01")])
    assert catalogue.version("test-1").version == "test-1"
    with pytest.raises(PriceUnknown):
        catalogue.at(datetime(2026, 2, 1, tzinfo=UTC))
