"""`make bench-train-gpu`: LoRA at the size of Llama-3.1-8B, packed, ours beside TRL's SFTTrainer,
each in its best setting.

Tokens per second, the share of the device's dense bf16 peak, peak memory of the device. Where no CUDA device is it says
so and ends well. `python -m bench.train.gpu --shape tiny --device cpu` shows on any machine that both sides run; its
figures mean nothing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.report import last_line, machine, spread
from bench.train.figures import GIB
from bench.train.gpu_shapes import GPU_SHAPES, GPU_TRL_SETTINGS, OUR_SETTINGS, GpuShape, mfu
from bench.train.shapes import LOSS_TOLERANCE
from bench.train.side import Side

SETTINGS = {"gpu_ours": OUR_SETTINGS, "gpu_trl": GPU_TRL_SETTINGS}
LABELS = {"gpu_ours": "ours", "gpu_trl": "TRL"}
Results = dict[str, list[dict[str, Any]]]
Run = Callable[[str, str], dict[str, Any]]


def main() -> int:
    parser = argparse.ArgumentParser(description="The training engine beside TRL on a GPU.")
    parser.add_argument("--shape", choices=list(GPU_SHAPES), default="8B")
    parser.add_argument("--device", choices=["cuda:0", "cpu"], default="cuda:0")
    arguments = parser.parse_args()
    if arguments.device != "cpu" and not torch.cuda.is_available():
        print("bench train-gpu: no CUDA device is here, so nothing was measured")
        return 0
    shape = GPU_SHAPES[arguments.shape]
    closing: list[str] = []
    sound = True
    with tempfile.TemporaryDirectory(prefix="bench-train-gpu-") as name:
        sides = {side: Side(side) for side in SETTINGS}
        try:
            task = {"shape": shape.name, "device": arguments.device, "base": f"{name}/base"}
            made = sides["gpu_ours"].run(task | {"make": True})
            print(f"on {made['device']}, {machine()}; {made['weights'] / 1e9:.2f} billion weights", flush=True)
            runs = count()
            for length in shape.lengths:

                def run(side: str, setting: str, length: int = length) -> dict[str, Any]:
                    more = {"length": length, "setting": setting, "workdir": str(Path(name) / str(next(runs)))}
                    return sides[side].run(task | more)

                results = measure(shape, length, run)
                print("\n".join(table(results, made["weights"], made["device"])), flush=True)
                line, counts = closing_line(length, results)
                closing.append(line)
                sound &= counts
        finally:
            for side in sides.values():
                side.close()
    print("\n".join(closing))
    return 0 if sound else 1


def measure(shape: GpuShape, length: int, run: Run) -> Results:
    """One run of every setting, then rounds of each side's fastest."""
    best: dict[str, str] = {}
    for side, settings in SETTINGS.items():
        speeds = {}
        for setting, chosen in settings.items():
            if chosen.batch_size > shape.sequences_per_step(length):
                continue
            try:
                result = run(side, setting)
            except RuntimeError as error:
                print(f"  {LABELS[side]} {setting} fails: {str(error).strip().splitlines()[-1][:200]}", flush=True)
                continue
            speeds[setting] = result["tokens"] / result["seconds"]
        if not speeds:
            raise RuntimeError(
                f"no setting of {LABELS[side]} runs at {length} tokens; build/bench-train-{side}.log says why"
            )
        best[side] = max(speeds, key=speeds.__getitem__)
        listed = ", ".join(f"{setting} {speed:.0f}" for setting, speed in speeds.items())
        print(f"packed {length}: {LABELS[side]} {listed} tokens/s; best: {best[side]}", flush=True)
    results: Results = {side: [] for side in SETTINGS}
    for _ in range(shape.rounds):
        for side, setting in best.items():
            results[side].append(run(side, setting))
    return results


def table(results: Results, weights: int, device: str) -> list[str]:
    lines = []
    for side, label in LABELS.items():
        speeds = _speeds(results[side])
        share = mfu(median(speeds), weights, device)
        lines.append(
            f"  {label:5} {spread(speeds)} tokens/s, MFU {'unknown' if share is None else f'{share:.1%}'}, "
            f"peak {_median(results[side], 'peak_bytes') / GIB:.2f} GiB, loss {_median(results[side], 'loss'):.4f}"
        )
    return lines


def closing_line(length: int, results: Results) -> tuple[str, bool]:
    """And whether it counts: the mean losses of the timed steps have to agree."""
    name = f"train-gpu.lora{length}"
    ours, theirs = (_median(results[side], "loss") for side in LABELS)
    gap = abs(ours - theirs) / theirs
    if gap > LOSS_TOLERANCE:
        return (
            f"bench {name}: does not count, the losses are {gap:.2%} apart and {LOSS_TOLERANCE:.1%} is the limit",
            False,
        )
    speeds = [median(_speeds(results[side])) for side in LABELS]
    return last_line(name, speeds[0], speeds[1], "tokens/s", "TRL"), True


def _speeds(results: list[dict[str, Any]]) -> list[float]:
    return [result["tokens"] / result["seconds"] for result in results]


def _median(results: list[dict[str, Any]], name: str) -> float:
    return median(result[name] for result in results)


if __name__ == "__main__":
    sys.exit(main())
