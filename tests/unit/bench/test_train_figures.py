"""The lines of the training benchmark: medians, the last lines' form, and no ratio where the losses are apart."""

from typing import Any

from bench.train.figures import GIB, Figures, best_setting, last_lines, table, worth_trying
from bench.train.shapes import HEADLINE, LOSS_TOLERANCE, PER_STEP, SHAPES, TRL_SETTINGS


def result(speed: float, *, loss: float = 8.0, gib: float = 1.0) -> dict[str, Any]:
    return {
        "tokens": 1000,
        "seconds": 1000 / speed,
        "cpu_seconds": 1600 / speed,
        "peak_bytes": gib * GIB,
        "start_bytes": GIB // 4,
        "loss": loss,
    }


def figures(method: Any = "lora", shape: str = HEADLINE, **more: Any) -> Figures:
    one = Figures(shape=shape, method=method, setting="grouped-2", loss_before=9.0)
    sides = {
        "ours": [result(300), result(900), result(290)],
        "trl": [result(100, gib=2.0), result(110, gib=2.5), result(40, gib=2.0)],
        "plain": [result(200), result(150), result(150)],
    }
    for side, results in (sides | more).items():
        one.results[side] = results
    return one


def test_the_last_lines_have_the_medians_of_the_rounds() -> None:
    assert last_lines([figures(), figures("full", trl=[result(60, gib=4.0)] * 3, plain=[result(200)] * 3)]) == (
        [
            "bench train.lora: ratio 3.00 (ours 300.00 tokens/s, TRL 100.00 tokens/s)",
            "bench train.full: ratio 5.00 (ours 300.00 tokens/s, TRL 60.00 tokens/s)",
            "bench train.memory: ratio 0.50 (ours 1.00 GiB, TRL 2.00 GiB)",
            "bench train.plain: ratio 1.50 (ours 300.00 tokens/s, plain loop 200.00 tokens/s)",
        ],
        True,
    )


def test_preferences_have_a_speed_of_their_own_and_no_plain_loop() -> None:
    one = figures("dpo")
    del one.results["plain"]
    lines, sound = last_lines([one])
    assert lines == ["bench train.dpo: ratio 3.00 (ours 300.00 tokens/s, TRL 100.00 tokens/s)"]
    assert sound


def test_other_shapes_are_in_the_table_only() -> None:
    lines, _ = last_lines([figures(shape="1M", ours=[result(1)] * 3), figures()])
    assert len(lines) == 3
    assert "ratio 3.00" in lines[0]
    alone, _ = last_lines([figures(shape="1M")])
    assert "ratio 3.00" in alone[0]


def test_a_figure_whose_losses_are_apart_is_not_printed_as_one() -> None:
    apart = 8.0 / (1 - 1.1 * LOSS_TOLERANCE)
    lines, sound = last_lines([figures(trl=[result(100, loss=apart)] * 3)])
    assert lines[0] == "bench train.lora: does not count, the losses are 0.55% apart and 0.5% is the limit"
    assert "ratio" not in lines[1]
    assert "ratio 1.50" not in lines[0]
    assert "ratio" in lines[2]
    assert not sound


def test_losses_as_far_apart_as_the_limit_allows_count() -> None:
    lines, sound = last_lines([figures(trl=[result(100, loss=8.0 / (1 + 0.9 * LOSS_TOLERANCE))] * 3)])
    assert "ratio 3.00" in lines[0]
    assert sound


def test_a_shape_that_does_not_count_fails_the_run_though_its_lines_are_not_the_last() -> None:
    lines, sound = last_lines([figures(), figures(shape="1M", plain=[result(100, loss=9.0)] * 3)])
    assert all("ratio" in line for line in lines)
    assert not sound


def test_the_table_says_what_each_side_did_and_what_does_not_count() -> None:
    ours, trl, plain = table(figures(plain=[result(150, loss=9.0)] * 3))
    assert "300.00 (290.00 to 900.00) tokens/s" in ours
    assert "peak 1.00 GiB (in training 0.75)" in ours
    assert "TRL grouped-2" in trl
    assert "ours: 3.00 x tokens/s, 3.00 x by CPU time, 0.50 x memory" in trl
    assert "DOES NOT COUNT" not in trl
    assert "DOES NOT COUNT, the losses are 11.11% apart" in plain


def test_the_best_setting_is_the_fastest_and_among_equals_the_one_of_least_cpu_time() -> None:
    slow = result(50) | {"cpu_seconds": 0.1}
    assert best_setting({"a": result(100), "b": result(110), "c": slow}) == "b"
    assert best_setting({"a": result(100) | {"cpu_seconds": 12.0}, "b": result(110), "c": slow}) == "a"


def test_only_what_was_far_behind_is_not_tried_again() -> None:
    names = ["a", "b", "c"]
    assert worth_trying(names, {}) == names
    assert worth_trying(names, {"a": 100.0, "b": 70.0, "c": 60.0}) == ["a", "b"]


def test_every_setting_of_trl_steps_on_as_many_examples_as_we_do() -> None:
    for method, settings in TRL_SETTINGS.items():
        for setting in settings.values():
            if setting.layout != "packed":
                assert setting.batch_size * setting.accumulation == PER_STEP[method]
    for name, shape in SHAPES.items():
        assert name == shape.name
        assert all(shape.examples(method, pilot=True) >= PER_STEP[method] for method in shape.methods)
        assert shape.pilot_of in ("", *SHAPES)
