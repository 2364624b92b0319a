"""The verdict of a soak: what grows is found, what breathes is not, and the ledger may grow."""

from __future__ import annotations

from typing import Any

from bench.soak.flatness import MIB, growth, percentile, rising
from bench.soak.gauges import Sample
from bench.soak.soak_verdict import tables_of, verdict
from bench.soak.traffic import Figures


def sample(number: int, **changes: Any) -> Sample:
    given: dict[str, Any] = {
        "at_s": 10.0 * number,
        "memory_bytes": {"billing": 100 * MIB},
        "cpu_s": {"billing": 5.0 * number},
        "table_bytes": {"billing.usage_records": number * 100 * MIB, "billing.inbox": 3 * MIB},
        "stream_bytes": {"USAGE": (number % 3) * 5 * MIB},
        "unread": {"USAGE for billing": 50},
        "unpublished": 20,
        "queued_jobs": 2000,
        "leases_lost": 0,
        "usage_records": number,
    }
    return Sample(**{**given, **changes})


def soaked(count: int = 30, **grows: Any) -> list[Sample]:
    """Samples in which each of `grows` is a function of the sample's number."""
    return [sample(number, **{name: grow(number) for name, grow in grows.items()}) for number in range(count)]


def found(samples: list[Sample], figures: Figures | None = None) -> list[str]:
    return verdict(samples, figures or Figures(), rate=1000)


def test_what_breathes_is_flat_and_the_ledger_may_grow() -> None:
    assert found(soaked()) == []


def test_each_thing_that_grows_is_named() -> None:
    assert found(soaked(memory_bytes=lambda n: {"billing": (100 + 5 * n) * MIB})) == [
        "memory of billing rose from 165.0 to 245.0 MiB"
    ]
    assert found(soaked(table_bytes=lambda n: {"billing.inbox": n * MIB})) == [
        "table billing.inbox rose from 13.0 to 29.0 MiB"
    ]
    assert found(soaked(stream_bytes=lambda n: {"USAGE": n * MIB})) == ["stream USAGE rose from 13.0 to 29.0 MiB"]
    assert found(soaked(unread=lambda n: {"USAGE for billing": n * 1000})) == [
        "lag of USAGE for billing rose from 13000.0 to 29000.0 events"
    ]
    assert found(soaked(unpublished=lambda n: n * 1000)) == ["outbox rose from 13000.0 to 29000.0 events"]


def test_losses_and_a_rate_that_was_not_reached_are_told() -> None:
    figures = Figures(usage_behind_s=9.0)
    figures.failures["chat: ENGINE_FAILED"] = 3
    assert found(soaked(leases_lost=lambda n: n // 29), figures) == [
        "1 leases were lost",
        "usage is 9 s behind its rate: this machine cannot do 1000 a second",
        "3 x chat: ENGINE_FAILED",
    ]


def test_the_table_shows_shares_of_a_core() -> None:
    lines = tables_of(soaked())
    assert any(line.split() == ["billing", "100", "100", "0.50"] for line in lines)
    assert any("billing.usage_records" in line and "kept for ever" in line for line in lines)


def test_growth_leaves_out_the_warm_up() -> None:
    assert growth([1000, 1000, *range(8)]) == (1, 7)
    assert growth([]) == (0, 0)
    assert rising("x", [5.0] * 9, slack=0, unit="MiB") == []


def test_a_percentile_of_few_is_their_highest() -> None:
    assert percentile([], 0.99) == 0.0
    assert percentile([3.0, 1.0, 2.0], 0.99) == 3.0
    assert percentile(list(range(200)), 0.99) == 198
