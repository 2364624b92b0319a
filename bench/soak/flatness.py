"""Whether a series of samples is flat, and what a soak's figures say. Pure: numbers in, sentences out.

The first part of a soak is the mesh warming up. Of the rest, the last third may not lie above the first one by more
than a share and a slack; what grows for ever passes any share in the end, and what breathes does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

WARM_SHARE = 0.2
GROWTH_SHARE_MAX = 0.15
MIB = 1024 * 1024
# What may come and go without meaning anything.
MEMORY_SLACK_BYTES = 24 * MIB
TABLE_SLACK_BYTES = 8 * MIB
STREAM_SLACK_BYTES = 8 * MIB


def percentile(values: Sequence[float], share: float) -> float:
    """0 of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0


def growth(series: Sequence[float]) -> tuple[float, float]:
    """The highest value of the first third after the warm-up, and of the last one."""
    steady = series[int(len(series) * WARM_SHARE) :]
    third = max(1, len(steady) // 3)
    return max(steady[:third], default=0), max(steady[-third:], default=0)


def rising(name: str, series: Sequence[float], *, slack: float, unit: str, scale: float = 1.0) -> list[str]:
    """A sentence when the series is not flat."""
    first, last = growth(series)
    if last <= first * (1 + GROWTH_SHARE_MAX) + slack:
        return []
    return [f"{name} rose from {first / scale:.1f} to {last / scale:.1f} {unit}"]


def by_name(samples: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Each name's series; 0 where it was not there yet."""
    names = {name: None for sample in samples for name in sample}
    return {name: [sample.get(name, 0) for sample in samples] for name in names}
