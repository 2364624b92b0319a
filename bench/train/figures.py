"""What the rounds of one shape and method found, as lines to print. Pure: results in, lines out.

A result is what a side answers: `tokens` (real ones), `seconds`, `cpu_seconds`, `peak_bytes`, `start_bytes` and `loss`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from bench.report import last_line, spread
from bench.train.shapes import FAR_BEHIND, HEADLINE, LOSS_TOLERANCE, Method

GIB = 1024**3
# Between two runs of the same work, on a machine that is not quite quiet.
PILOT_NOISE = 1.15


@dataclass(kw_only=True)
class Figures:
    """`setting` is TRL's best one; `loss_before` is the held-out loss of the weights that every side starts from."""

    shape: str
    method: Method
    setting: str
    loss_before: float
    results: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))

    def speeds(self, side: str) -> list[float]:
        return [result["tokens"] / result["seconds"] for result in self.results[side]]

    def speed(self, side: str) -> float:
        return median(self.speeds(side))

    def cpu_speed(self, side: str) -> float:
        return median(result["tokens"] / result["cpu_seconds"] for result in self.results[side])

    def memory_gib(self, side: str) -> float:
        return median(result["peak_bytes"] for result in self.results[side]) / GIB

    def own_memory_gib(self, side: str) -> float:
        """Without what the libraries and the model held before the first step."""
        return median(result["peak_bytes"] - result["start_bytes"] for result in self.results[side]) / GIB

    def loss(self, side: str) -> float:
        return median(result["loss"] for result in self.results[side])

    def gap(self, side: str) -> float:
        """How far a side's loss is from ours, as a share."""
        return abs(self.loss("ours") - self.loss(side)) / self.loss(side)

    def counts(self, side: str) -> bool:
        return self.gap(side) <= LOSS_TOLERANCE

    def sides(self) -> list[str]:
        return list(self.results)


def best_setting(results: Mapping[str, Mapping[str, float]]) -> str:
    """The fastest; of those whose times one short run each does not tell apart, the one
    that takes the least CPU time."""
    speeds = {name: result["tokens"] / result["seconds"] for name, result in results.items()}
    close = [name for name, speed in speeds.items() if speed * PILOT_NOISE >= max(speeds.values())]
    return max(close, key=lambda name: results[name]["tokens"] / results[name]["cpu_seconds"])


def worth_trying(names: Sequence[str], earlier: Mapping[str, float]) -> list[str]:
    """Those of `names` that were not far behind, by their `earlier` speeds; all of them where there are none."""
    return [name for name in names if not earlier or earlier[name] * FAR_BEHIND >= max(earlier.values())]


def table(figures: Figures) -> list[str]:
    """A line for each side."""
    labels = {"ours": "ours", "trl": f"TRL {figures.setting}", "plain": "plain loop"}
    lines = []
    for side in figures.sides():
        verdict = ""
        if side != "ours":
            wall = figures.speed("ours") / figures.speed(side)
            cpu = figures.cpu_speed("ours") / figures.cpu_speed(side)
            memory = figures.memory_gib("ours") / figures.memory_gib(side)
            verdict = f"  ours: {wall:.2f} x tokens/s, {cpu:.2f} x by CPU time, {memory:.2f} x memory"
            if not figures.counts(side):
                verdict += f"; DOES NOT COUNT, {_apart(figures, side)}"
        lines.append(
            f"  {labels[side]:26} {spread(figures.speeds(side)):>28} tokens/s  peak {figures.memory_gib(side):.2f} GiB "
            f"(in training {figures.own_memory_gib(side):.2f})  loss {figures.loss(side):.4f} "
            f"(from {figures.loss_before:.4f}){verdict}"
        )
    return lines


def last_lines(measured: Sequence[Figures]) -> tuple[list[str], bool]:
    """The lines that a reader and a script look for, and whether all of them count. They are of the headline's shape,
    or where that was not measured of all shapes."""
    chosen = [one for one in measured if one.shape == HEADLINE] or list(measured)
    lines, sound = [], True

    def add(name: str, one: Figures, side: str, line: str) -> None:
        nonlocal sound
        if not one.counts(side):
            sound = False
            line = f"bench {name}: does not count, {_apart(one, side)}"
        lines.append(line)

    for one in chosen:
        name = f"train.{one.method}"
        add(name, one, "trl", last_line(name, one.speed("ours"), one.speed("trl"), "tokens/s", "TRL"))
    # Of the methods that both are compared in, the one where we stand worst.
    supervised = [one for one in chosen if one.method != "dpo"]
    if supervised:
        worst = max(supervised, key=lambda one: one.memory_gib("ours") / one.memory_gib("trl"))
        line = last_line("train.memory", worst.memory_gib("ours"), worst.memory_gib("trl"), "GiB", "TRL")
        add("train.memory", worst, "trl", line)
        slowest = min(supervised, key=lambda one: one.speed("ours") / one.speed("plain"))
        line = last_line("train.plain", slowest.speed("ours"), slowest.speed("plain"), "tokens/s", "plain loop")
        add("train.plain", slowest, "plain", line)
    return lines, sound and all(one.counts(side) for one in measured for side in one.sides())


def _apart(figures: Figures, side: str) -> str:
    return f"the losses are {figures.gap(side):.2%} apart and {LOSS_TOLERANCE:.1%} is the limit"
