"""The verdict of a year: what docs/retention.md bounds may not grow, and what it keeps for ever may."""

from __future__ import annotations

from typing import Any

from bench.year.measures import Sample, Size
from bench.year.year_verdict import Rule, extrapolate, read_rules, verdict
from services.billing.config import BillingSettings

MIB = 1024 * 1024
RULES = {
    "billing.inbox": Rule(for_ever=False, retention_s=30 * 86_400.0),
    "billing.postings": Rule(for_ever=True, retention_s=None),
    "billing.budget_alerts": Rule(for_ever=False, retention_s=400 * 86_400.0),
}


def sample(day: int, **tables: Size) -> Sample:
    given = {
        "inbox": Size(rows=3000, bytes=MIB),
        "postings": Size(rows=200 * day, bytes=day * MIB),
        "budget_alerts": Size(rows=1000 * day, bytes=day * MIB),
    }
    return Sample(
        day=day,
        events=100 * day,
        records=200 * day,
        settle_s=(1.0,),
        tables={f"billing.{name}": size for name, size in (given | tables).items()},
        streams={"USAGE": Size(rows=day % 3, bytes=0)},
        unread={"USAGE for billing": 0},
        archive=Size(rows=day, bytes=day * 1000),
        memory_bytes={"services": 100 * MIB},
    )


def found(grow: Any = lambda day: {}) -> list[str]:
    return verdict([sample(day, **grow(day)) for day in range(7, 365, 7)], RULES, 365)


def test_what_is_kept_for_ever_or_longer_than_the_run_may_grow() -> None:
    assert found() == []


def test_a_bounded_table_that_grows_is_named() -> None:
    assert found(lambda day: {"inbox": Size(rows=100 * day, bytes=MIB)}) == [
        "billing.inbox grew from 18200 to 36400 rows"
    ]
    assert found(lambda day: {"inbox": Size(rows=3000, bytes=day * MIB)}) == [
        f"billing.inbox grew from {182 * MIB} to {364 * MIB} bytes"
    ]
    assert found(lambda day: {"news": Size(rows=0, bytes=0)}) == ["billing.news has no rule in docs/retention.md"]


def test_rules_are_those_of_the_page() -> None:
    page = (
        "\n## Tables of every service\n\n| `inbox` | `inbox_retention_s` (30 days), longer than all | relay |\n"
        "\n## billing\n\n| `postings` | for ever: the ledger | |\n\n## inference\n"
    )
    rules = read_rules(page, {"billing": BillingSettings()})
    assert rules == {name: RULES[name] for name in ("billing.inbox", "billing.postings")}


def test_figures_are_carried_over_to_a_hundred_events_a_second() -> None:
    lines = list(extrapolate([sample(day) for day in range(7, 365, 7)], RULES, 365))
    # 30 rows for each of a hundred events a day, so 30 days of 8.64 million events.
    assert any("billing.inbox: 30 days, 30.00 rows" in line and "259.2 million rows" in line for line in lines)
    assert any("billing.postings" in line for line in lines)
    assert not any("billing.budget_alerts" in line for line in lines)
