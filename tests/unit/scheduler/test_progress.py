"""What a report adds: nothing twice, and an evaluation is told from a step."""

from dataclasses import replace

from services.scheduler.attempts.progress import Known, Metric, in_words, kinds, news
from services.scheduler.jobs.job import EventKind


def metric(step: int, *, validation_loss: float | None = None, salt: str = "") -> Metric:
    return Metric(
        step=step,
        step_count=10,
        training_loss=2.0,
        validation_loss=validation_loss,
        remaining_s=None,
        encoded=f"{step}{validation_loss}{salt}".encode(),
    )


def test_a_report_that_is_repeated_adds_nothing() -> None:
    report = [metric(1), metric(2), metric(2, validation_loss=1.5)]
    known = Known(step=2, encoded=report[-1].encoded)
    assert news(report, known) == []


def test_a_repeated_report_that_grew_adds_what_is_new() -> None:
    report = [metric(1), metric(2), metric(3)]
    assert news(report, Known(step=2, encoded=metric(2).encoded)) == [metric(3)]


def test_without_the_last_known_metric_all_is_new() -> None:
    assert news([metric(5)], Known(step=4, encoded=metric(4).encoded)) == [metric(5)]
    assert news([metric(1)], None) == [metric(1)]


def test_a_metric_at_the_step_of_the_one_before_is_an_evaluation() -> None:
    report = [metric(1), metric(1, validation_loss=1.0), metric(2, validation_loss=1.0)]
    assert kinds(report, None) == [EventKind.METRICS, EventKind.EVALUATION, EventKind.METRICS]


def test_the_step_before_may_be_in_an_earlier_report() -> None:
    known = Known(step=4, encoded=metric(4).encoded)
    assert kinds([metric(4, validation_loss=1.0)], known) == [EventKind.EVALUATION]


def test_what_comes_before_the_first_step_is_an_evaluation() -> None:
    assert kinds([metric(0, validation_loss=3.0), metric(1)], None) == [EventKind.EVALUATION, EventKind.METRICS]


def test_in_words() -> None:
    assert in_words(metric(3), EventKind.METRICS) == "step 3 of 10: training loss 2.0000"
    assert in_words(metric(3, validation_loss=1.25), EventKind.EVALUATION) == (
        "validation loss 1.2500 after step 3 of 10"
    )
    preferred = replace(metric(3, validation_loss=0.5), rewards=(0.875, 0.25))
    assert in_words(preferred, EventKind.EVALUATION) == (
        "validation loss 0.5000, rewards 88% right by a margin of 0.2500, after step 3 of 10"
    )
