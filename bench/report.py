"""How a benchmark ends: medians of interleaved rounds and one last line with the ratio. It measures nothing itself."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from statistics import median


def machine() -> str:
    """What the figures were measured on, in one line."""
    load = os.getloadavg()[0]
    return f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, load {load:.1f}"


def spread(values: Sequence[float]) -> str:
    """`1.23 (1.20 to 1.31)`: median, least and most."""
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def pace(latencies_s: Sequence[float], took_s: float) -> dict[str, float]:
    """What a load generator prints of its calls, which together took `took_s`: calls/s and latencies in ms."""
    ordered = sorted(latencies_s)
    return {
        "calls_per_s": len(ordered) / took_s,
        "p50_ms": ordered[len(ordered) // 2] * 1000,
        "p99_ms": ordered[int(len(ordered) * 0.99)] * 1000,
    }


def last_line(name: str, ours: float, peer: float, unit: str, peer_name: str) -> str:
    """The line that a reader and a script look for."""
    return f"bench {name}: ratio {ours / peer:.2f} (ours {ours:.2f} {unit}, {peer_name} {peer:.2f} {unit})"
