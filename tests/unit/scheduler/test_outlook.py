"""What settings come to on their data: the steps that the trainer takes, a warning for each surprise with its cure,
and a refusal of what can never be meant."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from services.scheduler.spec.defaults import complete
from services.scheduler.spec.outlook import DataSize, Outlook, outlook_of, violations_of_outlook
from services.scheduler.spec.tuning_limits import BaseFacts, load_limits
from services.scheduler.spec.tuning_methods import Dpo
from services.scheduler.spec.tuning_spec import EarlyStopping, Hyperparameters, Schedule, TuningSpec
from services.scheduler.spec.violations import violations_of
from services.trainer.train.checkpoint.position import Position
from services.trainer.train.data.schedule import schedule_run
from services.trainer.train.loop.early_stopping import judge
from services.trainer.train.settings.methods import EarlyStopping as TrainerStopping

BASE = load_limits().of("finemesh/demo-llama", BaseFacts(context_tokens_max=2048, adapter_rank_max=64))


def spec_of(gpu_count: int = 0, **settings: Any) -> TuningSpec:
    asked = TuningSpec(
        base_model="finemesh/demo-llama",
        training_file="projects/p/files/f",
        validation_file="projects/p/files/v" if settings.get("evaluations") else "",
        hyperparameters=Hyperparameters(**settings),
        gpu_count=gpu_count,
    )
    assert violations_of(asked) == []
    spec, violations = complete(asked, BASE, "ft-1")
    assert violations == []
    return spec


def outlook(spec: TuningSpec, rows: int, packed: int | None = None, truncated: int = 0) -> Outlook:
    packed = rows if packed is None else packed
    size = DataSize(example_count=rows, truncated_count=truncated, row_count=rows, packed_count=packed)
    found = outlook_of(spec, size)
    assert found is not None
    return found


def look(rows: int, packed: int | None = None, **settings: Any) -> Outlook:
    return outlook(spec_of(**settings), rows, packed)


def warned(rows: int, packed: int | None = None, **settings: Any) -> dict[str, tuple[str, str]]:
    return {
        warning.field.removeprefix("spec.").removeprefix("hyperparameters."): (warning.description, warning.cure)
        for warning in look(rows, packed, **settings).warnings
    }


def test_an_ordinary_run_is_told_its_steps_and_nothing_else() -> None:
    found = look(1000, 120, epochs=3, evaluations=2, warmup_ratio=0.1, batch_size=8)
    assert found == Outlook(sequence_count=120, steps_per_epoch=15, step_count=45, warnings=())


def test_eight_short_rows_in_one_sequence_are_one_step() -> None:
    """The whole run, at its full rate: the warm-up takes no step of it."""
    found = warned(8, 1, warmup_ratio=0.05)
    assert set(found) == {"batch_size"}
    description, cure = found["batch_size"]
    assert "the whole run is one step: a batch of 8 takes the only sequence at once" in description
    assert cure == (
        "lower batch_size, or set packing to false, so that each row is a sequence of its own, or raise epochs"
    )


def test_a_batch_larger_than_the_data_makes_each_epoch_a_step() -> None:
    description, cure = warned(20, epochs=3, batch_size=16, gradient_accumulation_steps=2, packing=False)["batch_size"]
    assert "a step would take 32 sequences, and there are 20: each of the 3 epochs is one step" in description
    assert cure == "lower batch_size, or lower gradient_accumulation_steps, or raise epochs"


@pytest.mark.parametrize(
    ("rows", "settings", "field", "words"),
    [
        (16, {"warmup_ratio": 0.05}, "warmup_ratio", "the first of only 2 steps learns nothing"),
        (800, {"warmup_ratio": 0.6}, "warmup_ratio", "60 of 100 steps warm up"),
        (40, {"evaluations": 8}, "evaluations", "3 of its 8 evaluations see the same weights"),
        (40, {"checkpoints": 6}, "checkpoints", "the run has 5 steps, so 6 checkpoints are 5"),
        (40, {"checkpoint_interval_steps": 5}, "checkpoint_interval_steps", "none is saved before its end"),
        (800, {"cycle_count": 1.0}, "cycle_count", "1 waves end near the peak"),
        (80, {"cycle_count": 5.5}, "cycle_count", "5.5 waves in 10 steps are too many"),
        (800, {"gpu_count": 8, "batch_size": 4}, "gpu_count", "a step takes 4 sequences"),
        (
            800,
            {"evaluations": 4, "early_stopping": EarlyStopping(patience=2)},
            "early_stopping",
            "",
        ),
    ],
)  # fmt: skip
def test_what_surprises_is_named_with_its_cure(rows: int, settings: dict[str, Any], field: str, words: str) -> None:
    found = warned(rows, packing=False, **settings)
    assert set(found) == ({field} if words else set())
    if words:
        assert words in found[field][0]
        assert found[field][1]


def test_a_patience_that_only_the_last_evaluation_can_end_is_told() -> None:
    stopping = EarlyStopping(patience=2, warmup_evaluations=0)
    found = warned(800, packing=False, evaluations=3, early_stopping=stopping)
    assert "at the run's last evaluation only" in found["early_stopping"][0]


def test_packing_that_mixes_nothing_is_told_and_only_where_rows_could_share() -> None:
    assert "no two of the 40 rows fit into a sequence of 2048 tokens" in warned(40, 40)["packing"][0]
    assert "packing" not in warned(40, 40, packing=False)
    assert "packing" not in warned(1, 1)
    pairs = replace(spec_of(), method=Dpo(beta=0.1), hyperparameters=replace(spec_of().hyperparameters, packing=True))
    assert outlook(pairs, 40).warnings == ()


def test_a_validation_file_that_nothing_is_evaluated_on_is_told() -> None:
    spec = replace(spec_of(packing=False), validation_file="projects/p/files/v")
    (warning,) = outlook(spec, 800).warnings
    assert warning.field == "spec.hyperparameters.evaluations"
    assert "the run is never evaluated" in warning.description


def test_examples_that_are_cut_are_told_when_they_are_many() -> None:
    spec = spec_of(packing=False, sequence_tokens_max=64)
    assert outlook(spec, 800, truncated=40).warnings == ()
    (warning,) = outlook(spec, 800, truncated=41).warnings
    assert warning.field == "spec.hyperparameters.sequence_tokens_max"
    assert "41 of 800 examples are cut at 64 tokens" in warning.description


def test_constant_and_falling_rates_are_ordinary() -> None:
    assert look(800, packing=False, min_learning_rate_ratio=1.0, cycle_count=1.0).warnings == ()
    assert look(800, packing=False, schedule=Schedule.LINEAR).warnings == ()
    assert look(800, packing=False, cycle_count=1.5).warnings == ()


def test_counts_of_an_earlier_version_tell_nothing() -> None:
    assert outlook_of(spec_of(), DataSize(example_count=8, row_count=0, packed_count=0)) is None


settings_of_a_run = st.fixed_dictionaries(
    {
        "epochs": st.integers(1, 4),
        "evaluations": st.integers(1, 9),
        "batch_size": st.integers(1, 16),
        "gradient_accumulation_steps": st.integers(1, 3),
        "packing": st.booleans(),
        "warmup_ratio": st.sampled_from([0.0, 0.03, 0.5, 1.0]),
        "cycle_count": st.sampled_from([0.25, 0.5, 1.0, 3.0]),
        "checkpoints": st.integers(1, 5),
    }
)


@given(st.integers(1, 60), st.integers(1, 60), settings_of_a_run)
def test_the_steps_that_are_told_are_those_that_the_trainer_takes(
    rows: int, packed: int, settings: dict[str, Any]
) -> None:
    assume(packed <= rows)
    found = look(rows, packed, **settings)
    schedule = schedule_run(
        packed if settings["packing"] else rows,
        sequences_per_step=settings["batch_size"] * settings["gradient_accumulation_steps"],
        epochs=settings["epochs"],
        evaluations=settings["evaluations"],
        checkpoints=settings["checkpoints"],
        checkpoint_every_steps=None,
        seed=0,
    )
    assert (found.steps_per_epoch, found.step_count) == (schedule.steps_per_epoch, schedule.total_steps)
    fields = [warning.field for warning in found.warnings]
    assert len(set(fields)) == len(fields)
    assert all(warning.description and warning.cure for warning in found.warnings)
    same = len(schedule.evaluations) > len({step for _, step in schedule.evaluations})
    assert ("spec.hyperparameters.evaluations" in fields) == same


@given(st.integers(1, 40), settings_of_a_run, st.integers(1, 4), st.integers(0, 4))
def test_early_stopping_is_refused_exactly_where_no_losses_could_end_the_run(
    rows: int, settings: dict[str, Any], patience: int, warmup: int
) -> None:
    assume(settings["epochs"] * settings["evaluations"] >= patience + warmup + 1)
    settings = {**settings, "packing": False}
    spec = spec_of(**settings, early_stopping=EarlyStopping(patience=patience, warmup_evaluations=warmup))
    found = outlook(spec, rows)
    # The worst that can come: no evaluation is better than the first.
    rule, position = TrainerStopping(patience=patience, min_delta=0.0, warmup_evaluations=warmup), Position()
    schedule = schedule_run(
        rows,
        sequences_per_step=settings["batch_size"] * settings["gradient_accumulation_steps"],
        epochs=settings["epochs"],
        evaluations=settings["evaluations"],
        checkpoints=1,
        checkpoint_every_steps=None,
        seed=0,
    )
    stopped_at = None
    for number, step in schedule.evaluations:
        position = judge(replace(position, step=step), rule, number, 1.0, total_steps=schedule.total_steps + 1)
        if position.stopped_early and stopped_at is None:
            stopped_at = step
    refused = violations_of_outlook(spec, found)
    assert [violation.field for violation in refused] == (
        ["spec.hyperparameters.early_stopping"] if stopped_at is None else []
    )
    warns = any(warning.field == "spec.hyperparameters.early_stopping" for warning in found.warnings)
    assert warns == (stopped_at == schedule.total_steps)
