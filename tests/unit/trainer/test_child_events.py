"""What a child's events become: metered ranges exactly as told, metrics in the order of the steps,
faults to whom they belong."""

import io
from typing import Any

import pytest

from chassis.errors import DataLoss, FieldViolation, InvalidArgument
from finemesh.tuning.v1 import tuning_job_pb2 as tuning
from services.trainer.attempt import convert
from services.trainer.attempt.child_events import mismatch
from services.trainer.attempt.run_view import RunView
from services.trainer.config import TrainerSettings
from services.trainer.integrations.wandb.curves import values_of
from services.trainer.train.checkpoint.position import Position
from services.trainer.train.data.schedule import REPORT_STEPS_MAX, schedule_run
from services.trainer.train.loop.progress_report import Progress, StepRecord
from services.trainer.train.runtime.event_stream import EventStream


def started(**fields: Any) -> dict[str, Any]:
    return {
        "start_step": 0,
        "total_steps": 10,
        "steps_per_epoch": 5,
        "train_token_count": 100,
        "evaluations_total": 0,
        "validation_token_count": 0,
        **fields,
    }


def progress(start: int, end: int, **fields: Any) -> dict[str, Any]:
    steps = [
        {"step": step, "loss": 1.0 / step, "learning_rate": 0.1, "train_tokens": 7}
        for step in range(start + 1, end + 1)
    ]
    return {
        "start_step": start,
        "end_step": end,
        "train_tokens": 7 * (end - start),
        "tokens_per_second": 70.0,
        "eta_s": 2.5,
        "steps": steps,
        **fields,
    }


def evaluation(number: int, step: int, loss: float) -> dict[str, Any]:
    return {"evaluation": number, "step": step, "validation_tokens": 50, "loss": loss}


def test_a_range_is_metered_as_it_was_told() -> None:
    view = RunView()
    view.started(started())
    report = view.progress(progress(0, 3))
    (usage,) = report.usage
    assert (usage.kind, usage.start_step, usage.end_step, usage.tokens) == ("train", 0, 3, 21)
    assert [(item.step, item.trained_tokens, item.epoch) for item in report.metrics] == [
        (1, 7, 0.2),
        (2, 14, 0.4),
        (3, 21, 0.6),
    ]
    assert not report.metrics[0].HasField("validation_loss")
    assert (report.metrics[0].step_count, report.metrics[0].remaining_s) == (10, 2.5)
    assert view.step == 3


def test_the_balancing_loss_of_a_mixture_is_shown_beside_the_loss_of_its_step() -> None:
    view = RunView()
    view.started(started())
    assert not view.progress(progress(0, 1)).metrics[0].HasField("balancing_loss")
    event = progress(1, 3)
    for step in event["steps"]:
        step["balancing_loss"] = 2.0 + step["step"]
    items = view.progress(event).metrics
    assert [item.balancing_loss for item in items] == [4.0, 5.0]
    assert [values_of(item)["train/balancing_loss"] for item in items] == [4.0, 5.0]
    assert values_of(items[0])["train/loss"] == event["steps"][0]["loss"]


def test_an_evaluation_inside_a_range_is_metered_at_once_and_shown_at_its_step() -> None:
    view = RunView()
    view.started(started())
    at_once = view.evaluation(evaluation(1, 2, 0.5))
    assert [(entry.kind, entry.start_step, entry.end_step, entry.tokens) for entry in at_once.usage] == [
        ("evaluate", 1, 1, 50)
    ]
    assert at_once.metrics == []
    later = view.progress(progress(0, 3)).metrics
    assert [item.step for item in later] == [1, 2, 2, 3]
    assert [item.HasField("validation_loss") for item in later] == [False, False, True, True]
    assert later[-1].validation_loss == 0.5


def test_evaluations_on_one_step_are_metered_one_by_one() -> None:
    view = RunView()
    view.started(started())
    view.progress(progress(0, 3))
    reports = [view.evaluation(evaluation(number, 3, 0.1 * number)) for number in (1, 2)]
    assert [report.usage[0].start_step for report in reports] == [1, 2]
    assert [report.metrics[0].step for report in reports] == [3, 3]


def test_the_look_before_the_first_step_costs_nothing() -> None:
    view = RunView()
    view.started(started())
    report = view.evaluation(evaluation(0, 0, 3.0))
    assert report.usage == []
    assert report.metrics[0].initial_validation_loss == 3.0
    assert view.progress(progress(0, 1)).metrics[0].initial_validation_loss == 3.0


def test_a_resumed_run_goes_on_with_its_totals() -> None:
    view = RunView(4)
    view.started(started(start_step=4, trained_tokens=28, validation_loss=0.5, initial_validation_loss=2.0))
    item = view.progress(progress(4, 5)).metrics[0]
    assert (item.trained_tokens, item.validation_loss, item.initial_validation_loss) == (35, 0.5, 2.0)


def test_reports_merge_in_order() -> None:
    view = RunView()
    view.started(started())
    merged = view.progress(progress(0, 2))
    merged.merge(view.progress(progress(2, 4)))
    merged.merge(view.warning({"code": "ROWS_TRUNCATED", "message": "3 rows"}))
    assert [item.step for item in merged.metrics] == [1, 2, 3, 4]
    assert [(entry.start_step, entry.end_step) for entry in merged.usage] == [(0, 2), (2, 4)]
    assert merged.warnings == ["ROWS_TRUNCATED: 3 rows"]


@pytest.mark.parametrize(
    ("kind", "reason", "platform_fault", "retryable"),
    [
        ("user", "TRAINING_INPUT_INVALID", False, False),
        ("platform", "TRAINING_FAILED", True, True),
        ("platform", "PARITY_FAILED", True, False),
    ],
)
def test_a_failure_belongs_to_whom_the_child_says(
    kind: str, reason: str, platform_fault: bool, retryable: bool
) -> None:
    violations = [{"field": "epochs", "description": "1 to 100"}]
    details = {"parity.merged": "0.2 nats"}
    event = {"kind": kind, "reason": reason, "message": "m", "violations": violations, "details": details}
    failed = convert.failed_event_to_proto(event)
    assert (failed.error.reason, failed.error.platform_fault, failed.retryable) == (reason, platform_fault, retryable)
    assert dict(failed.error.metadata) == {"epochs": "1 to 100", **details}


def test_a_silent_death_is_the_platforms_and_may_be_tried_again() -> None:
    killed = convert.exit_to_proto(-9, "")
    assert "signal 9" in killed.error.message
    assert killed.error.platform_fault
    assert killed.retryable
    assert convert.exit_to_proto(77, "bye").error.metadata["last_words"] == "bye"


def test_the_nodes_own_errors() -> None:
    lost = convert.error_to_proto(DataLoss("DATA_CORRUPT", "gone", metadata={"key": "k"}))
    assert (lost.error.platform_fault, lost.retryable, lost.error.metadata["key"]) == (True, True, "k")
    invalid = InvalidArgument("INVALID_FIELD", "m", violations=[FieldViolation("hyperparameters.batch_size", "rule")])
    refused = convert.error_to_proto(invalid, user_fault=True)
    assert (refused.error.platform_fault, refused.retryable) == (False, False)
    assert refused.error.metadata["hyperparameters.batch_size"] == "rule"


def test_metadata_is_bounded() -> None:
    violations = [{"field": f"f{number}", "description": "x" * 5000} for number in range(100)]
    failed = convert.failed_event_to_proto(
        {"kind": "user", "reason": "DATASET_INVALID", "message": "m" * 10_000, "violations": violations}
    )
    assert failed.ByteSize() < 16 * 1024


def test_counts_that_differ_from_the_quote_are_named() -> None:
    counts = tuning.DatasetCounts(training_tokens=100, validation_tokens=50)
    assert mismatch(started(), counts) is None
    assert mismatch(started(), tuning.DatasetCounts()) is None
    assert mismatch(started(evaluations_total=2, validation_token_count=50), counts) is None
    wrong = mismatch(started(train_token_count=99, evaluations_total=1, validation_token_count=51), counts)
    assert wrong is not None
    assert "99 training tokens instead of 100" in wrong
    assert "51 validation tokens instead of 50" in wrong


def test_rewards_and_the_best_evaluation_are_part_of_the_progress() -> None:
    view = RunView()
    view.started(started())
    view.progress(progress(0, 2))
    found = {
        "evaluation": 1,
        "step": 2,
        "validation_tokens": 50,
        "loss": 0.5,
        "reward_accuracy": 0.75,
        "reward_margin": -0.5,
        "best_step": 2,
        "best_loss": 0.5,
        "stopped_early": True,
    }
    (item,) = view.evaluation(found).metrics
    assert (item.validation_loss, item.reward_accuracy, item.reward_margin) == (0.5, 0.75, -0.5)
    assert (item.best_step, item.best_validation_loss, item.stopped_early) == (2, 0.5, True)
    # One inside a range that is told later comes with that range.
    later = {**found, "evaluation": 2, "step": 4, "reward_accuracy": 1.0, "best_step": 4, "stopped_early": False}
    assert view.evaluation(later).metrics == []
    item = view.progress(progress(2, 4)).metrics[-1]
    assert (item.step, item.reward_accuracy, item.best_step, item.stopped_early) == (4, 1.0, 4, False)


def test_a_run_without_preferences_tells_no_rewards() -> None:
    view = RunView()
    view.started(started())
    view.progress(progress(0, 2))
    (item,) = view.evaluation({"evaluation": 1, "step": 2, "validation_tokens": 50, "loss": 0.5}).metrics
    assert not any(item.HasField(name) for name in ("reward_accuracy", "reward_margin", "best_step"))


def test_the_longest_range_fits_a_line_of_the_agent() -> None:
    line = io.StringIO()
    plan = schedule_run(
        1, sequences_per_step=1, epochs=1, evaluations=0, checkpoints=1, checkpoint_every_steps=None, seed=1
    )
    progress = Progress(plan, EventStream(line), train_tokens_total=1, validation_tokens=0)
    for step in range(REPORT_STEPS_MAX):
        # As many digits as each of them can have.
        record = StepRecord(
            step=10**9 + step,
            loss=1.2345678901234567e-05,
            learning_rate=1.2345678901234567e-05,
            grad_norm=1.2345678901234567e-05,
            train_tokens=10**9,
        )
        progress.add(record, 0.0, 1.0)
    progress.flush(Position())
    assert len(line.getvalue()) < TrainerSettings().child_line_bytes_max / 4
