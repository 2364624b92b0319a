"""Collects finished steps and reports them in the schedule's ranges, with throughput and the time that is left.

The ranges are what is metered; their ends come from the schedule, never from the clock. It knows no model.
"""

from collections import deque
from dataclasses import asdict, dataclass
from math import inf

from services.trainer.train.checkpoint.position import Position
from services.trainer.train.data.schedule import RunSchedule
from services.trainer.train.runtime.event_stream import Emit, sign_of_life

# Steps over which the throughput is averaged.
WINDOW_STEPS = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """One finished step, counted from 1; `loss` is the mean over its labelled tokens, `train_tokens` leaves pads out.
    `balancing_loss` is what a mixture of experts learns from besides, before its coefficient; it is no part of
    `loss`, which is compared with that of validation rows."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    train_tokens: int
    balancing_loss: float | None = None


class Progress:
    """`train_tokens_total` is for the whole run, `validation_tokens` for one evaluation."""

    def __init__(self, schedule: RunSchedule, emit: Emit, train_tokens_total: int, validation_tokens: int) -> None:
        self._schedule = schedule
        self._emit = emit
        self._train_tokens_total = train_tokens_total
        self._validation_tokens = validation_tokens
        self._start_step = 0
        self._records: list[StepRecord] = []
        self._window: deque[tuple[int, float]] = deque(maxlen=WINDOW_STEPS)
        self._evaluation_s: float | None = None
        self._seen_s = -inf
        self._report_life = sign_of_life(emit, "training", schedule.total_steps)

    def start_at(self, position: Position) -> None:
        """Checkpoints stand at range ends, so a resumed run opens the very next range."""
        self._start_step = position.step
        self._report_life = sign_of_life(self._emit, "training", self._schedule.total_steps, position.step)

    def add(self, record: StepRecord, started_s: float, seen_s: float) -> None:
        """Adds a finished step; both times are of one clock. A step may be launched before the numbers of the one ahead
        of it are read, and that time counts once."""
        self._records.append(record)
        self._window.append((record.train_tokens, seen_s - max(started_s, self._seen_s)))
        self._seen_s = seen_s
        self._report_life(1)

    def note_evaluation(self, duration_s: float) -> None:
        self._evaluation_s = duration_s

    def flush(self, position: Position, *, partial: bool = False) -> None:
        """Reports the steps since the last range as [start_step, end_step); nothing when there are none.

        A partial range ends where the schedule has no end. It may be metered only when no attempt follows.
        """
        if not self._records:
            return
        last = self._records[-1]
        tokens_per_second = self._tokens_per_second()
        self._emit(
            "progress",
            start_step=self._start_step,
            end_step=last.step,
            partial=partial,
            train_tokens=sum(record.train_tokens for record in self._records),
            step=last.step,
            total_steps=self._schedule.total_steps,
            epoch=round(last.step / self._schedule.steps_per_epoch, 4),
            loss=sum(record.loss for record in self._records) / len(self._records),
            learning_rate=last.learning_rate,
            grad_norm=last.grad_norm,
            tokens_per_second=round(tokens_per_second, 1),
            eta_s=round(self._eta_s(position, tokens_per_second), 1),
            steps=[asdict(record) for record in self._records],
        )
        self._start_step = last.step
        self._records = []

    def _tokens_per_second(self) -> float:
        seconds = sum(duration_s for _, duration_s in self._window)
        return sum(tokens for tokens, _ in self._window) / max(seconds, 1e-9)

    def _eta_s(self, position: Position, tokens_per_second: float) -> float:
        training_s = (self._train_tokens_total - position.metered_train_tokens) / tokens_per_second
        # Before the first evaluation: a forward pass is about a third of a step.
        evaluation_s = self._evaluation_s
        if evaluation_s is None:
            evaluation_s = self._validation_tokens / (3 * tokens_per_second)
        return training_s + (len(self._schedule.evaluations) - position.evaluations_done) * evaluation_s
