"""The GPU benchmark's arithmetic and lines, and what it does on a machine without a GPU."""

from typing import Any

import pytest
import torch

from bench.train import gpu
from bench.train.bench_rows import gpu_rows, tokens_in
from bench.train.gpu_shapes import GPU_SHAPES, GPU_TRL_SETTINGS, OUR_SETTINGS, WARM_STEPS, mfu, peak_flops


def results(speed: float, loss: float = 11.0) -> list[dict[str, Any]]:
    return [
        {"tokens": 1000, "seconds": 1000 / factor / speed, "peak_bytes": 2**31, "loss": loss} for factor in (1, 3, 1)
    ]


def test_the_share_of_the_peak_is_four_operations_per_weight_and_token() -> None:
    assert mfu(13_000, 8_030_000_000, "NVIDIA H100 80GB HBM3") == pytest.approx(0.4222, abs=1e-4)
    assert mfu(13_000, 8_030_000_000, "a device of next year") is None


def test_the_longest_name_of_the_table_counts() -> None:
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12


def test_a_machine_without_a_gpu_is_told_so_and_fails_nobody(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu"])
    assert gpu.main() == 0
    assert "no CUDA device is here" in capsys.readouterr().out


def test_the_closing_line_has_the_ratio_of_medians() -> None:
    line, counts = gpu.closing_line(4096, {"gpu_ours": results(1300), "gpu_trl": results(1000)})
    assert line == "bench train-gpu.lora4096: ratio 1.30 (ours 1300.00 tokens/s, TRL 1000.00 tokens/s)"
    assert counts


def test_no_ratio_where_the_losses_are_apart() -> None:
    line, counts = gpu.closing_line(4096, {"gpu_ours": results(1300, 11.2), "gpu_trl": results(1000)})
    assert line.startswith("bench train-gpu.lora4096: does not count")
    assert not counts


def test_the_fastest_setting_that_runs_is_what_the_rounds_have() -> None:
    asked: list[tuple[str, str]] = []
    speeds = {"1": 10.0, "1-recomputed": 30.0, "2-recomputed": 20.0, "sdpa-1": 25.0, "sdpa-1-recomputed": 5.0}

    def run(side: str, setting: str) -> dict[str, Any]:
        asked.append((side, setting))
        if setting not in speeds:
            raise RuntimeError("out of memory")
        return results(speeds[setting])[0]

    shape = GPU_SHAPES["8B"]
    found = gpu.measure(shape, 8192, run)
    assert asked[-2 * shape.rounds :] == [("gpu_ours", "1-recomputed"), ("gpu_trl", "sdpa-1")] * shape.rounds
    assert {side: len(rounds) for side, rounds in found.items()} == {"gpu_ours": shape.rounds, "gpu_trl": shape.rounds}


def test_a_side_of_which_nothing_runs_ends_the_benchmark() -> None:
    def run(side: str, setting: str) -> dict[str, Any]:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="no setting of ours runs at 2048 tokens"):
        gpu.measure(GPU_SHAPES["8B"], 2048, run)


def test_the_rows_suffice_for_every_step_and_the_steps_are_whole() -> None:
    shape = GPU_SHAPES["tiny"]
    for length in shape.lengths:
        rows = gpu_rows(shape, length)
        assert tokens_in(rows) > (WARM_STEPS + shape.timed_steps) * shape.step_tokens * 1.1
        assert max(len(row.ids) for row in rows) <= length
    for shape in GPU_SHAPES.values():
        for length in shape.lengths:
            assert shape.sequences_per_step(length) * length == shape.step_tokens
            for setting in (*OUR_SETTINGS.values(), *GPU_TRL_SETTINGS.values()):
                assert shape.sequences_per_step(length) % setting.batch_size == 0
