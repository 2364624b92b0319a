"""The run as the events of its child describe it, kept in the form of the scheduler's reports. Not pure: protobuf.

It keeps what later reports must repeat: the last validation loss, the tokens so far. Metered ranges are exactly those
that the child told.
"""

from dataclasses import dataclass, field

from finemesh.nodes.v1 import node_service_pb2
from finemesh.tuning.v1 import tuning_job_pb2 as tuning
from services.trainer.attempt.convert import TEXT_CHARS_MAX, usage_to_proto
from services.trainer.child.training_child import Event

TRAIN = "train"
EVALUATE = "evaluate"


@dataclass
class ProgressReport:
    """Grows by merging what follows it in the queue."""

    metrics: list[tuning.TuningProgress] = field(default_factory=list)
    usage: list[node_service_pb2.TrainingUsage] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def merge(self, later: "ProgressReport") -> None:
        self.metrics += later.metrics
        self.usage += later.usage
        self.warnings += later.warnings


class RunView:
    """The run as its events told it so far. Metrics come out in the order of the steps."""

    def __init__(self, step: int = 0) -> None:
        self.step = step
        self._last = tuning.TuningProgress()
        self._steps_per_epoch = 1
        # Evaluations inside a range whose steps are told later, by step.
        self._evaluated: dict[int, Event] = {}

    def started(self, event: Event) -> None:
        """A resumed run goes on with the totals of the one before, where the event tells them."""
        self.step = int(event["start_step"])
        self._steps_per_epoch = max(1, int(event["steps_per_epoch"]))
        self._last = tuning.TuningProgress(
            step=self.step, step_count=int(event["total_steps"]), trained_tokens=int(event.get("trained_tokens") or 0)
        )
        if event.get("initial_validation_loss") is not None:
            self._last.initial_validation_loss = float(event["initial_validation_loss"])
        if event.get("validation_loss") is not None:
            self._note({**event, "loss": event["validation_loss"]})

    def progress(self, event: Event) -> ProgressReport:
        """One item per step, one usage entry for the whole metered range."""
        report = ProgressReport()
        for step in event["steps"]:
            self._last.step = int(step["step"])
            self._last.epoch = self._last.step / self._steps_per_epoch
            self._last.training_loss = float(step["loss"])
            self._last.learning_rate = float(step["learning_rate"])
            self._last.tokens_per_second = float(event["tokens_per_second"])
            self._last.trained_tokens += int(step["train_tokens"])
            if step.get("balancing_loss") is not None:
                self._last.balancing_loss = float(step["balancing_loss"])
            if event.get("eta_s") is not None:
                self._last.remaining_s = float(event["eta_s"])
            report.metrics.append(_copy(self._last))
            if self._last.step in self._evaluated:
                self._note(self._evaluated.pop(self._last.step))
                report.metrics.append(_copy(self._last))
        start, end = int(event["start_step"]), int(event["end_step"])
        report.usage.append(usage_to_proto(TRAIN, start, end, int(event["train_tokens"])))
        self.step = end
        return report

    def evaluation(self, event: Event) -> ProgressReport:
        """One more item at the step of the evaluation. Number 0 comes before the first step and costs nothing."""
        number, step, loss = int(event["evaluation"]), int(event["step"]), float(event["loss"])
        if number == 0:
            self._last.initial_validation_loss = loss
            return ProgressReport(metrics=[_copy(self._last)])
        report = ProgressReport(usage=[usage_to_proto(EVALUATE, number, number, int(event["validation_tokens"]))])
        if step > self.step:
            self._evaluated[step] = event
        else:
            self._note(event)
            report.metrics.append(_copy(self._last))
        return report

    def _note(self, event: Event) -> None:
        """What an evaluation found, and what early stopping concluded from it."""
        self._last.validation_loss = float(event["loss"])
        for ours, theirs in (
            ("reward_accuracy", "reward_accuracy"),
            ("reward_margin", "reward_margin"),
            ("best_validation_loss", "best_loss"),
        ):
            if event.get(theirs) is not None:
                setattr(self._last, ours, float(event[theirs]))
        if event.get("best_step") is not None:
            self._last.best_step = int(event["best_step"])
        self._last.stopped_early = bool(event.get("stopped_early"))

    def warning(self, event: Event) -> ProgressReport:
        return ProgressReport(warnings=[f"{event['code']}: {event['message']}"[:TEXT_CHARS_MAX]])


def _copy(progress: tuning.TuningProgress) -> tuning.TuningProgress:
    copied = tuning.TuningProgress()
    copied.CopyFrom(progress)
    return copied
