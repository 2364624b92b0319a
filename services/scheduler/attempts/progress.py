"""What a progress report adds to a job's history. Pure: it compares a report with what was known and knows no store."""

from collections.abc import Sequence
from dataclasses import dataclass

from services.scheduler.jobs.job import EventKind


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One reported TuningProgress; `encoded` is the whole message. `rewards` are accuracy and margin of preferences."""

    step: int
    step_count: int
    training_loss: float
    validation_loss: float | None
    remaining_s: float | None
    encoded: bytes
    rewards: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Known:
    """The last metric that the same attempt reported."""

    step: int
    encoded: bytes


def news(metrics: Sequence[Metric], known: Known | None) -> list[Metric]:
    """The metrics that are not recorded yet.

    Reports come in order, so one that is repeated after a lost answer, alone or merged with later ones, holds the last
    recorded metric: what is up to it is recorded.
    """
    if known is not None:
        for index in range(len(metrics) - 1, -1, -1):
            if metrics[index].encoded == known.encoded:
                return list(metrics[index + 1 :])
    return list(metrics)


def kinds(metrics: Sequence[Metric], known: Known | None) -> list[EventKind]:
    """A metric at the step of the one before it is the result of an evaluation, and so is one before the first step."""
    previous = known.step if known is not None else 0
    result = []
    for metric in metrics:
        result.append(EventKind.EVALUATION if metric.step == previous else EventKind.METRICS)
        previous = metric.step
    return result


def in_words(metric: Metric, kind: EventKind) -> str:
    if kind is EventKind.EVALUATION and metric.validation_loss is not None:
        rewards = ""
        if metric.rewards is not None:
            accuracy, margin = metric.rewards
            rewards = f", rewards {accuracy:.0%} right by a margin of {margin:.4f},"
        return f"validation loss {metric.validation_loss:.4f}{rewards} after step {metric.step} of {metric.step_count}"
    return f"step {metric.step} of {metric.step_count}: training loss {metric.training_loss:.4f}"
