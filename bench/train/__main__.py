"""`make bench-train`: tokens per second, peak memory and loss of the engine,
of TRL's trainers in their best setting and of a plain loop of our own.

Which setting of TRL is best is tried first, on a part of the rows; then whole runs alternate, and medians count. Tokens
are real ones, pads not counted. A pair of figures counts only when both sides have the same held-out loss after the
same tokens. `python -m bench.train 12M lora` runs a part. Exit code 1: a figure does not count.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from math import log
from pathlib import Path
from typing import Any

from bench.report import machine
from bench.train.figures import GIB, Figures, best_setting, last_lines, table, worth_trying
from bench.train.shapes import METHODS, SHAPES, THREADS, TRL_SETTINGS, Method, Shape
from bench.train.side import Side

ROUNDS = 3
# Tokens per second of TRL's settings, by shape and method.
Pilots = dict[tuple[str, Method], dict[str, float]]


def main() -> int:
    shapes = [shape for name, shape in SHAPES.items() if name in sys.argv[1:]] or list(SHAPES.values())
    methods = [method for method in METHODS if method in sys.argv[1:]] or list(METHODS)
    began = time.perf_counter()
    print(
        f"on {machine()}, {THREADS} threads for each side; real tokens per second, "
        f"median of {ROUNDS} interleaved rounds (least to most)",
        flush=True,
    )
    measured = []
    with tempfile.TemporaryDirectory(prefix="bench-train-") as name, sides() as workers:
        pilots: Pilots = {}
        for shape in shapes:
            bench = Bench(workers, shape, Path(name), pilots)
            for method in methods:
                if method in shape.methods:
                    measured.append(bench.measure(method))
                    print("\n".join(table(measured[-1])), flush=True)
    print(f"took {time.perf_counter() - began:.0f} s; {machine()}")
    lines, sound = last_lines(measured)
    print("\n".join(lines))
    return 0 if sound else 1


@contextmanager
def sides() -> Iterator[dict[str, Side]]:
    workers = {name: Side(name) for name in ("ours", "trl", "plain")}
    try:
        yield workers
    finally:
        for worker in workers.values():
            worker.close()


class Bench:
    """Of one shape; makes its base model."""

    def __init__(self, workers: dict[str, Side], shape: Shape, folder: Path, pilots: Pilots) -> None:
        self._workers = workers
        self._shape = shape
        self._folder = folder
        self._pilots = pilots
        self._base = str(folder / f"base-{shape.name}")
        self._runs = count()
        self._loss_before = workers["plain"].run({"make": True, "shape": shape.name, "base": self._base})["loss"]

    def measure(self, method: Method) -> Figures:
        setting = self._best_setting(method)
        # Before the first step an answer is as likely as under the reference.
        loss_before = log(2) if method == "dpo" else self._loss_before
        figures = Figures(shape=self._shape.name, method=method, setting=setting, loss_before=loss_before)
        rivals = ["ours", "trl"] if method == "dpo" else ["ours", "trl", "plain"]
        for number in range(ROUNDS):
            # Nobody is always the first one after somebody else.
            for side in rivals[number % len(rivals) :] + rivals[: number % len(rivals)]:
                more = {"setting": setting} if side == "trl" else {}
                figures.results[side].append(self._run(side, method, pilot=False, **more))
        figures.results = {side: figures.results[side] for side in rivals}
        return figures

    def _best_setting(self, method: Method) -> str:
        """By one run of each on the pilot's rows."""
        settings = worth_trying(list(TRL_SETTINGS[method]), self._pilots.get((self._shape.pilot_of, method), {}))
        tried = {setting: self._run("trl", method, pilot=True, setting=setting) for setting in settings}
        speeds = {setting: result["tokens"] / result["seconds"] for setting, result in tried.items()}
        self._pilots[self._shape.name, method] = speeds
        best = best_setting(tried)
        listed = ", ".join(
            f"{setting} {speeds[setting]:.0f} ({tried[setting]['peak_bytes'] / GIB:.2f} GiB)" for setting in speeds
        )
        unit = "pairs" if method == "dpo" else "rows"
        print(
            f"\n{self._shape.name} {method}: "
            f"pilot of TRL's settings on {self._shape.examples(method, pilot=True)} {unit}, "
            f"tokens/s: {listed}; best: {best}; timed runs have {self._shape.examples(method, pilot=False)} {unit}",
            flush=True,
        )
        return best

    def _run(self, side: str, method: Method, *, pilot: bool, **more: Any) -> dict[str, Any]:
        workdir = self._folder / f"{self._shape.name}-{method}-{next(self._runs)}"
        task = {
            "shape": self._shape.name,
            "method": method,
            "base": self._base,
            "examples": self._shape.examples(method, pilot=pilot),
            "workdir": str(workdir),
        }
        return self._workers[side].run(task | more)


if __name__ == "__main__":
    sys.exit(main())
