"""What a year's samples say: what docs/retention.md bounds may not grow, and what it keeps for ever has its price.

Pure: samples and rules in, lines out. The second and the fourth quarter are compared, since what is kept for a month is
full before the second one begins.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bench.soak.flatness import MIB
from bench.year.measures import Sample, Size
from bench.year.virtual_time import DAY_S
from chassis.settings import ChassisSettings

ROWS_SHARE_MAX, ROWS_SLACK = 0.05, 200
BYTES_SHARE_MAX, BYTES_SLACK = 0.15, 2 * MIB
MEMORY_SHARE_MAX, MEMORY_SLACK_BYTES = 0.15, 48 * MIB
STREAM_SLACK_BYTES = 2 * MIB
# The rate that the figures are carried over to.
EVENTS_PER_S = 100
GIB = 1024**3
# One row for each day or month and resource: they do not grow with the rate.
BY_THE_DAY = ("billing.invoices", "billing.usage_sums")
_ROW = re.compile(r"^\| `(\w+)` \| (.+?) \|", re.MULTILINE)
_SETTING = re.compile(r"`(\w+_s)`")
_SHARED = "Tables of every service"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How long a table's rows are kept: for ever, for `retention_s`, or, when that is None, until something ends."""

    for_ever: bool
    retention_s: float | None

    def is_seen(self, days: int) -> bool:
        """Whether what is past keeping goes before the second quarter begins."""
        return not self.for_ever and (self.retention_s or 0.0) <= days / 4 * DAY_S


def read_rules(page: str, services: Mapping[str, ChassisSettings]) -> dict[str, Rule]:
    """By `service.table`, from docs/retention.md and the settings that it names."""
    rules = {}
    for service, settings in services.items():
        for heading in (_SHARED, service):
            section = page.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
            for table, kept in _ROW.findall(section):
                named = [float(getattr(settings, name)) for name in _SETTING.findall(kept) if hasattr(settings, name)]
                rules[f"{service}.{table}"] = Rule(
                    for_ever=kept.startswith("for ever"), retention_s=max(named) if named else None
                )
    return rules


def verdict(samples: Sequence[Sample], rules: Mapping[str, Rule], days: int) -> list[str]:
    """A sentence for each thing that grew and may not."""
    second, fourth = _quarter(samples, 2, days), _quarter(samples, 4, days)
    problems = []
    for name in sorted(fourth[-1].tables):
        if name not in rules:
            problems.append(f"{name} has no rule in docs/retention.md")
        elif rules[name].is_seen(days):
            problems += _grown(name, *(_largest([each.tables[name] for each in part]) for part in (second, fourth)))
    for name in sorted(fourth[-1].streams):
        before, after = (
            _largest([each.streams[name] for each in part if name in each.streams]) for part in (second, fourth)
        )
        if after.bytes > before.bytes * (1 + BYTES_SHARE_MAX) + STREAM_SLACK_BYTES:
            problems.append(f"stream {name} grew from {before.bytes} to {after.bytes} bytes")
    for name in fourth[-1].memory_bytes:
        before_bytes, after_bytes = (max(each.memory_bytes[name] for each in part) for part in (second, fourth))
        if after_bytes > before_bytes * (1 + MEMORY_SHARE_MAX) + MEMORY_SLACK_BYTES:
            problems.append(f"memory of {name} grew from {before_bytes // MIB} to {after_bytes // MIB} MiB")
    behind = {name: count for name, count in fourth[-1].unread.items() if count}
    if behind:
        problems.append(f"readers are behind at the end: {behind}")
    return problems


def describe(sample: Sample) -> Iterator[str]:
    """All figures of one sample."""
    waits = sorted(sample.settle_s) or [0.0]
    yield f"day {sample.day}: {sample.events} events, {sample.records} usage records"
    yield f"  from a day's last event to its last booking: p50 {waits[len(waits) // 2]:.2f} s, most {waits[-1]:.2f} s"
    yield "  memory: " + ", ".join(f"{name} {size // MIB} MiB" for name, size in sample.memory_bytes.items())
    yield f"  archive: {sample.archive.rows} files, {sample.archive.bytes / MIB:.1f} MiB"
    for name, size in sorted(sample.streams.items()):
        yield f"  stream {name}: {size.rows} messages, {size.bytes} bytes"
    for name, size in sorted(sample.tables.items()):
        yield f"  {name}: {size.rows} rows, {size.bytes / MIB:.2f} MiB"


def extrapolate(samples: Sequence[Sample], rules: Mapping[str, Rule], days: int) -> Iterator[str]:
    """What the same mix comes to at a hundred events a second."""
    middle, last = _quarter(samples, 2, days)[-1], samples[-1]
    a_day, a_year = EVENTS_PER_S * DAY_S, EVENTS_PER_S * DAY_S * 365
    per_day = (last.events - middle.events) / (last.day - middle.day)
    scale = a_day / per_day
    yield f"bounded, at {EVENTS_PER_S} events/s ({scale:.0f} times the rate of this run): rate x retention"
    for name, size in sorted(last.tables.items()):
        rule = rules.get(name)
        if rule is not None and rule.is_seen(days) and size.rows >= 100:
            kept = f"{rule.retention_s / DAY_S:g} days" if rule.retention_s else "while it lives"
            yield (
                f"  {name}: {kept}, {size.rows / per_day:.2f} rows for each event of a day, "
                f"{size.bytes / size.rows:.0f} B a row: {size.rows * scale / 1e6:.1f} million rows, "
                f"{size.bytes * scale / GIB:.1f} GiB"
            )
    yield f"kept for ever: bytes for each event of the last half, and in a year of {EVENTS_PER_S} events/s"
    total = 0.0
    grown = {
        name: (middle.tables[name].bytes, size.bytes) for name, size in last.tables.items() if name in middle.tables
    }
    grown["files of the archive"] = (middle.archive.bytes, last.archive.bytes)
    for name, (before, after) in sorted(grown.items()):
        if name in BY_THE_DAY:
            a_day_bytes = (after - before) / (last.day - middle.day)
            yield f"  {name}: whatever the rate, {a_day_bytes / 1024:.0f} KiB a day, {a_day_bytes * 365 / MIB:.0f} MiB"
            continue
        per_event = (after - before) / (last.events - middle.events)
        if (name not in rules or rules[name].for_ever) and per_event >= 0.5:
            total += per_event
            yield f"  {name}: {per_event:.0f} B, {per_event * a_year / GIB:.0f} GiB"
    records = (last.records - middle.records) / (last.events - middle.events)
    yield f"  together: {total:.0f} B, {total * a_year / GIB:.0f} GiB; {records:.1f} usage records in an event"


def _quarter(samples: Sequence[Sample], number: int, days: int) -> list[Sample]:
    first, last = (number - 1) * days / 4, number * days / 4
    return [sample for sample in samples if first < sample.day <= last]


def _largest(sizes: Sequence[Size]) -> Size:
    return Size(
        rows=max((each.rows for each in sizes), default=0), bytes=max((each.bytes for each in sizes), default=0)
    )


def _grown(name: str, before: Size, after: Size) -> list[str]:
    problems = []
    if after.rows > before.rows * (1 + ROWS_SHARE_MAX) + ROWS_SLACK:
        problems.append(f"{name} grew from {before.rows} to {after.rows} rows")
    if after.bytes > before.bytes * (1 + BYTES_SHARE_MAX) + BYTES_SLACK:
        problems.append(f"{name} grew from {before.bytes} to {after.bytes} bytes")
    return problems
