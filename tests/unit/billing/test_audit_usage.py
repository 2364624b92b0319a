"""A served record is priced by the version that was in force when it was used, and by no other."""

from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest

from services.billing.audit.usage_audit import UsageAudit, UsageRow
from services.billing.prices.catalogue import read_folder
from services.billing.prices.pricing import token_amount

BOOKS = {
    version: book
    for version, (book, _) in read_folder(Path(__file__).parents[3] / "services/billing/prices/books").items()
}
# default-2026-2 takes over from default-2026-1 on this day.
TAKES_OVER = datetime(2026, 12, 1, tzinfo=UTC)


def row(version: str, moment: datetime) -> UsageRow:
    return UsageRow(
        project_id="p",
        work_key="ep-1:1:0",
        kind="endpoint_minutes",
        organization_id="o",
        resource="projects/p/endpoints/ep-1",
        model="cpu",
        quantity=1,
        unit_price_nanos_usd=1_000_000,
        amount_nanos_usd=1_000_000,
        price_book_version=version,
        start_step=0,
        end_step=0,
        usage_time=moment,
        api_key_id="",
        billing_month=date(moment.year, moment.month, 1),
        transaction_id=None,
    )


@pytest.mark.parametrize(
    ("version", "moment", "expected"),
    [
        ("default-2026-1", TAKES_OVER - timedelta(microseconds=1), None),
        ("default-2026-2", TAKES_OVER, None),
        ("default-2026-1", TAKES_OVER, "use before 2026-12-01"),
        ("default-2026-2", TAKES_OVER - timedelta(microseconds=1), "use from 2026-12-01"),
    ],
)
@pytest.mark.parametrize("end_is_known", [True, False])
def test_use_is_within_the_time_of_its_price_book(
    version: str, moment: datetime, expected: str | None, end_is_known: bool
) -> None:
    books = dict(BOOKS)
    if not end_is_known:
        # The database keeps a version as it began: its end was written into the file later.
        books["default-2026-1"] = replace(books["default-2026-1"], effective_until=None)
    found = UsageAudit(books, {}).record(row(version, moment))
    assert (found is None) if expected is None else (found is not None and found.expected.startswith(expected)), found


@pytest.mark.parametrize(("key", "right"), [("gen-1", True), ("gen-1:128-301", True), ("gen-1:128-300", False)])
def test_a_part_of_a_call_is_as_long_as_its_key_says(key: str, right: bool) -> None:
    part = replace_row(row("default-2026-2", TAKES_OVER), work_key=f"{key}:output")
    found = UsageAudit(BOOKS, {}).record(part)
    assert (found is None) if right else (found is not None and "173 tokens" in found.expected), found


def replace_row(served: UsageRow, *, work_key: str) -> UsageRow:
    """The same for 173 generated tokens."""
    price = BOOKS["default-2026-2"].inference_rate("finemesh/demo-llama").output_nanos_usd_per_million
    return served._replace(
        work_key=work_key,
        kind="output_tokens",
        resource="acme/bot",
        model="finemesh/demo-llama",
        quantity=173,
        unit_price_nanos_usd=price,
        amount_nanos_usd=token_amount(173, price),
    )
