"""What a child's events mean to the scheduler: progress with exactly the metered ranges that the child told, and endings.

It keeps what later reports must repeat (the last validation loss, the tokens so far) and does nothing else.
"""

import errno
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from chassis.errors import DomainError
from finemesh.nodes.v1 import node_service_pb2 as node_service
from finemesh.tuning.v1 import tuning_job_pb2 as tuning
from services.trainer.transfer import StoredFile

TRAIN = "train"
EVALUATE = "evaluate"
METADATA_ENTRIES_MAX = 20
METADATA_CHARS_MAX = 500
# Failures that a new attempt of the same work would meet again.
_DETERMINISTIC = frozenset({"PARITY_FAILED", "NOT_OFFERED", "JOB_TOO_LARGE", "INVALID_FIELD", "MODEL_INVALID"})

# No room on the device, beyond the quota, beyond the size that this process may write.
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

Event = Mapping[str, Any]


@dataclass
class ProgressReport:
    """Grows by merging what follows it in the queue."""

    metrics: list[tuning.TuningProgress] = field(default_factory=list)
    usage: list[node_service.TrainingUsage] = field(default_factory=list)
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
            if event.get("eta_s") is not None:
                self._last.remaining_s = float(event["eta_s"])
            report.metrics.append(_copy(self._last))
            if self._last.step in self._evaluated:
                self._note(self._evaluated.pop(self._last.step))
                report.metrics.append(_copy(self._last))
        start, end = int(event["start_step"]), int(event["end_step"])
        report.usage.append(_usage(TRAIN, start, end, int(event["train_tokens"])))
        self.step = end
        return report

    def evaluation(self, event: Event) -> ProgressReport:
        """One more item at the step of the evaluation. Number 0 is the look before the first step: it costs nothing."""
        number, step, loss = int(event["evaluation"]), int(event["step"]), float(event["loss"])
        if number == 0:
            self._last.initial_validation_loss = loss
            return ProgressReport(metrics=[_copy(self._last)])
        report = ProgressReport(usage=[_usage(EVALUATE, number, number, int(event["validation_tokens"]))])
        if step > self.step:
            self._evaluated[step] = event
        else:
            self._note(event)
            report.metrics.append(_copy(self._last))
        return report

    def _note(self, event: Event) -> None:
        """What an evaluation found, and what early stopping makes of it."""
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
        return ProgressReport(warnings=[f"{event['code']}: {event['message']}"[:METADATA_CHARS_MAX]])


def files_of(event: Event) -> list[StoredFile]:
    return [
        StoredFile(path=str(entry["path"]), size_bytes=int(entry["size_bytes"]), sha256=str(entry["sha256"]))
        for entry in event["files"]
    ]


def mismatch(event: Event, counts: tuning.DatasetCounts) -> str | None:
    """What the run counts differently from the analysis that priced it; None when both agree."""
    pairs = [("training tokens", int(event["train_token_count"]), counts.training_tokens)]
    if counts.validation_tokens and int(event["evaluations_total"]):
        pairs.append(("validation tokens", int(event["validation_token_count"]), counts.validation_tokens))
    wrong = [f"{run} {name} instead of {quoted}" for name, run, quoted in pairs if quoted and run != quoted]
    return "the run counts " + " and ".join(wrong) if wrong else None


def failed_by_child(event: Event) -> node_service.AttemptFailed:
    """The child said why; the user's faults are never tried again."""
    metadata = {str(entry["field"]): str(entry["description"]) for entry in event.get("violations") or ()}
    metadata |= {str(name): str(value) for name, value in (event.get("details") or {}).items()}
    is_platform = event["kind"] != "user"
    reason = str(event["reason"])
    return _failed(reason, str(event["message"]), is_platform, is_platform and reason not in _DETERMINISTIC, metadata)


def is_lost_peer(event: Event) -> bool:
    """Whether a process failed because another one of its run had."""
    return bool((event.get("details") or {}).get("cause") == "lost_peer")


def failed_without_a_word(exit_code: int, last_words: str) -> node_service.AttemptFailed:
    """Killed by a signal, out of memory, crashed: a platform fault that a new attempt may not meet."""
    how = f"was killed by signal {-exit_code}" if exit_code < 0 else f"ended with exit code {exit_code}"
    metadata = {"exit_code": str(exit_code)} | ({"last_words": last_words} if last_words else {})
    return _failed("TRAINING_FAILED", f"the training process {how} without a result", True, True, metadata)


def failed_by_error(error: DomainError, *, user_fault: bool = False) -> node_service.AttemptFailed:
    """The node's own work failed: inputs, store, or settings that no child could run."""
    metadata = dict(error.metadata) | {violation.field: violation.description for violation in error.violations}
    retryable = not user_fault and error.reason not in _DETERMINISTIC
    return _failed(error.reason, error.message, not user_fault, retryable, metadata)


def failed_by_disk(error: OSError) -> node_service.AttemptFailed | None:
    """The node has no room for what the attempt needs; elsewhere or later there may be. None for any other error."""
    if error.errno not in _FULL:
        return None
    return failed_platform(f"the disk of the node is full: {error.filename or error.strerror}", cause="disk_full")


def failed_platform(message: str, *, retryable: bool = True, **metadata: str) -> node_service.AttemptFailed:
    return _failed("TRAINING_FAILED", message, True, retryable, metadata)


def lineage_of(exported: Event) -> dict[str, str]:
    """The export's lineage and parity report as flat text."""
    flat = {f"parity.{name}": value for name, value in (exported.get("parity") or {}).items()}
    return {
        name: value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        for name, value in ({**(exported.get("lineage") or {}), **flat}).items()
    }


def _failed(
    reason: str, message: str, platform_fault: bool, retryable: bool, metadata: Mapping[str, str]
) -> node_service.AttemptFailed:
    entries = list(metadata.items())[:METADATA_ENTRIES_MAX]
    error = tuning.JobError(
        reason=reason,
        message=message[: 2 * METADATA_CHARS_MAX],
        platform_fault=platform_fault,
        metadata={name[:METADATA_CHARS_MAX]: value[:METADATA_CHARS_MAX] for name, value in entries},
    )
    return node_service.AttemptFailed(error=error, retryable=retryable)


def _usage(kind: str, start: int, end: int, tokens: int) -> node_service.TrainingUsage:
    return node_service.TrainingUsage(kind=kind, start_step=start, end_step=end, tokens=tokens)


def _copy(progress: tuning.TuningProgress) -> tuning.TuningProgress:
    copied = tuning.TuningProgress()
    copied.CopyFrom(progress)
    return copied
