"""What a run does, step by step, known before it starts: a pure function of the settings and the packed data.

Steps are counted from 0. "At step n" below means: when n steps are finished. It knows no model, no torch and no clock.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from formats.run_steps import evaluation_schedule, steps_of_epoch
from services.trainer.train.data.packing.shuffle import epoch_order

REPORTS_PER_RUN = 100
# Steps of one range. One event reports all of them, and the agent bounds the length of a line.
REPORT_STEPS_MAX = 3000
CHECKPOINTS_PER_RUN = 20


@dataclass(frozen=True, kw_only=True)
class RunSchedule:
    """`evaluations` are (number from 1, at step); `checkpoints` map a step to whether the user asked for it;
    `reports` are the ends of the metered ranges."""

    steps_per_epoch: int
    total_steps: int
    sequences_per_step: int
    seed: int
    evaluations: tuple[tuple[int, int], ...]
    checkpoints: dict[int, bool]
    reports: tuple[int, ...]

    @cached_property
    def report_set(self) -> frozenset[int]:
        return frozenset(self.reports)

    @cached_property
    def stops(self) -> frozenset[int]:
        """The numbers of finished steps at which something follows that needs all of them: a report, an evaluation or a
        checkpoint."""
        return self.report_set | self.checkpoints.keys() | {step for _, step in self.evaluations}

    def sequences_of_step(self, step: int, count: int) -> NDArray[np.int64]:
        """Indices of the sequences that step `step` trains on. The last step of an epoch takes what is left."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.sequences_per_step
        return _cached_order(self.seed, epoch, count)[start : start + self.sequences_per_step]


# One epoch is in use at a time; the order itself stays a pure function.
_cached_order = lru_cache(maxsize=1)(epoch_order)


def schedule_run(
    sequence_count: int,
    *,
    sequences_per_step: int,
    epochs: int,
    evaluations: int,
    checkpoints: int,
    checkpoint_every_steps: int | None,
    seed: int,
    may_end_at_evaluations: bool = False,
) -> RunSchedule:
    """A run that may end at an evaluation reports up to each of them, so that its last range is one of the schedule's,
    too."""
    steps_per_epoch = steps_of_epoch(sequence_count, sequences_per_step)
    total_steps = steps_per_epoch * epochs
    checkpoint_steps = checkpoint_schedule(total_steps, checkpoints, checkpoint_every_steps)
    evaluation_steps = evaluation_schedule(steps_per_epoch, epochs, evaluations)
    return RunSchedule(
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        sequences_per_step=sequences_per_step,
        seed=seed,
        evaluations=evaluation_steps,
        checkpoints=checkpoint_steps,
        reports=report_schedule(
            total_steps,
            steps_per_epoch,
            (*checkpoint_steps, *(step for _, step in evaluation_steps if may_end_at_evaluations)),
        ),
    )


def checkpoint_schedule(total_steps: int, asked: int, every: int | None) -> dict[int, bool]:
    """Step -> whether the user asked for it. The end of the run is always one."""
    interval = every or max(1, -(-total_steps // CHECKPOINTS_PER_RUN))
    plan = dict.fromkeys(range(interval, total_steps + 1, interval), False)
    for number in range(1, asked + 1):
        plan[max(1, total_steps * number // asked)] = True
    return dict(sorted(plan.items()))


def report_schedule(total_steps: int, steps_per_epoch: int, stops: tuple[int, ...]) -> tuple[int, ...]:
    """Ends of the ranges in which steps are reported and metered. They depend on the schedule alone, and every
    checkpoint is one of `stops`. So work redone from a checkpoint is reported in the same ranges as the first time. A
    range that is too long is cut further; the others stay what they were before there was such a limit."""
    interval = max(1, total_steps // REPORTS_PER_RUN)
    ends = set(range(interval, total_steps + 1, interval)) | set(stops)
    ends |= set(range(steps_per_epoch, total_steps + 1, steps_per_epoch)) | {total_steps}
    for start, end in pairwise(sorted({0} | ends)):
        ends |= set(range(start + REPORT_STEPS_MAX, end, REPORT_STEPS_MAX))
    return tuple(sorted(ends))
