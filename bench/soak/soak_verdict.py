"""What a soak's samples say: which series rose, what was lost, where the time went. Pure but for its types."""

from __future__ import annotations

from collections.abc import Sequence

from bench.soak.flatness import (
    MEMORY_SLACK_BYTES,
    MIB,
    STREAM_SLACK_BYTES,
    TABLE_SLACK_BYTES,
    by_name,
    growth,
    rising,
)
from bench.soak.gauges import Sample
from bench.soak.traffic import Figures

# Kept for ever: what was used and paid grows with use. Its size by record is printed instead.
LEDGER = frozenset({"billing.usage_records", "billing.usage_sums", "billing.transactions", "billing.postings"})
# As many seconds of usage may be on their way, and not more and more of them.
LAG_S = 3.0
BEHIND_S_MAX = 5.0


def verdict(samples: Sequence[Sample], figures: Figures, *, rate: float) -> list[str]:
    """Empty when everything is flat and nothing was lost."""
    found: list[str] = []
    for name, series in by_name([sample.memory_bytes for sample in samples]).items():
        found += rising(f"memory of {name}", series, slack=MEMORY_SLACK_BYTES, unit="MiB", scale=MIB)
    for name, series in by_name([sample.table_bytes for sample in samples]).items():
        if name not in LEDGER:
            found += rising(f"table {name}", series, slack=TABLE_SLACK_BYTES, unit="MiB", scale=MIB)
    for name, series in by_name([sample.stream_bytes for sample in samples]).items():
        found += rising(f"stream {name}", series, slack=STREAM_SLACK_BYTES, unit="MiB", scale=MIB)
    for name, series in by_name([sample.unread for sample in samples]).items():
        found += rising(f"lag of {name}", series, slack=rate * LAG_S, unit="events")
    found += rising("outbox", [sample.unpublished for sample in samples], slack=rate * LAG_S, unit="events")
    if samples and samples[-1].leases_lost:
        found.append(f"{samples[-1].leases_lost} leases were lost")
    if figures.usage_behind_s > BEHIND_S_MAX:
        found.append(
            f"usage is {figures.usage_behind_s:.0f} s behind its rate: this machine cannot do {rate:g} a second"
        )
    return found + [f"{count} x {name}" for name, count in figures.failures.items()]


def tables_of(samples: Sequence[Sample]) -> list[str]:
    """Memory and CPU of each process, and the sizes that moved, from the first steady third to the last one."""
    lines = ["process: memory in MiB, first to last third; share of one core"]
    took_s = samples[-1].at_s - samples[0].at_s or 1.0
    for name, series in by_name([sample.memory_bytes for sample in samples]).items():
        first, last = growth(series)
        cores = (samples[-1].cpu_s.get(name, 0.0) - samples[0].cpu_s.get(name, 0.0)) / took_s
        lines.append(f"  {name:<12} {first / MIB:7.0f} {last / MIB:7.0f}   {cores:.2f}")
    lines.append("tables and streams above 1 MiB, first to last third")
    for kind in ("table_bytes", "stream_bytes"):
        for name, series in by_name([getattr(sample, kind) for sample in samples]).items():
            first, last = growth(series)
            if max(first, last) > MIB:
                kept = " (kept for ever)" if name in LEDGER else ""
                lines.append(f"  {name:<28} {first / MIB:7.1f} {last / MIB:7.1f}{kept}")
    return lines
