"""What a storm does and when, derived from its seed alone. Pure: the same seed gives the same plan for ever.

Users work and parts of the mesh fail side by side; nobody waits for the other. It knows no process by its id.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Sequence
from dataclasses import dataclass

STORM_S = 7.0
# Everything is there before the first fault, so that a storm does not test the start of the mesh.
FIRST_FAULT_S = 0.5
FAULTS_MIN, FAULTS_MAX = 6, 14
# Steps backwards and forwards, up to far beyond every lease.
SHIFTS_S = (-90.0, -20.0, -5.0, 5.0, 20.0, 90.0)


class Work(enum.StrEnum):
    """What a user does."""

    JOB = "job"
    CHAT = "chat"
    STREAM = "stream"
    # A stream that its reader leaves.
    LEAVE = "leave"
    ENDPOINT = "endpoint"
    TOP_UP = "top_up"
    QUOTE = "quote"
    # A file that is uploaded, read and deleted.
    FILE = "file"


class Trouble(enum.StrEnum):
    """What happens to a process, to its links, or to its clock."""

    KILL = "kill"
    FREEZE = "freeze"
    CUT = "cut"
    SILENCE = "silence"
    CLOCK = "clock"


@dataclass(frozen=True, kw_only=True)
class Act:
    """A user's work, `number` within its seed. `size` is steps of a job; `cancel_s` is None for one that may end."""

    at_s: float
    work: Work
    number: int
    size: int
    pause_s: float
    cancel_s: float | None


@dataclass(frozen=True, kw_only=True)
class Fault:
    """`target` is a process, or a link for CUT and SILENCE; after `lasts_s` it is over."""

    at_s: float
    trouble: Trouble
    target: str
    lasts_s: float
    shift_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    seed: int
    acts: tuple[Act, ...]
    faults: tuple[Fault, ...]

    def lines(self) -> list[str]:
        """As a person reads it, in the order of time."""
        told = [(act.at_s, f"{act.work} {act.number} (size {act.size}, cancel {act.cancel_s})") for act in self.acts]
        told += [
            (fault.at_s, f"{fault.trouble} {fault.target} for {fault.lasts_s} s (shift {fault.shift_s} s)")
            for fault in self.faults
        ]
        return [f"{at_s:5.2f} s  {text}" for at_s, text in sorted(told)]


# How often each kind of work comes, in a storm of one organization.
COUNTS = {
    Work.JOB: (5, 8),
    Work.CHAT: (10, 16),
    Work.STREAM: (6, 10),
    Work.LEAVE: (3, 6),
    Work.ENDPOINT: (1, 2),
    Work.TOP_UP: (3, 5),
    Work.QUOTE: (2, 4),
    Work.FILE: (2, 4),
}
CANCELLED_SHARE = 0.35
WEIGHTS = {Trouble.KILL: 4, Trouble.FREEZE: 3, Trouble.CUT: 2, Trouble.SILENCE: 2, Trouble.CLOCK: 2}


def make_plan(seed: int, *, processes: Sequence[str], links: Sequence[str], clocks: Sequence[str]) -> Plan:
    """`clocks` are those that can be set: of processes, and of the database."""
    source = random.Random(seed)
    acts: list[Act] = []
    for work, (least, most) in COUNTS.items():
        for _ in range(source.randint(least, most)):
            cancel_s = round(source.uniform(0.0, 3.0), 2) if source.random() < CANCELLED_SHARE else None
            acts.append(
                Act(
                    at_s=round(source.uniform(0.0, STORM_S), 2),
                    work=work,
                    number=len(acts),
                    size=source.randint(4, 24),
                    pause_s=round(source.uniform(0.02, 0.12), 3),
                    cancel_s=cancel_s,
                )
            )
    targets = {Trouble.CUT: links, Trouble.SILENCE: links, Trouble.CLOCK: clocks}
    faults = []
    for _ in range(source.randint(FAULTS_MIN, FAULTS_MAX)):
        trouble = source.choices(list(WEIGHTS), weights=list(WEIGHTS.values()))[0]
        faults.append(
            Fault(
                at_s=round(source.uniform(FIRST_FAULT_S, STORM_S), 2),
                trouble=trouble,
                target=source.choice(targets.get(trouble, processes)),
                lasts_s=round(source.choice((source.uniform(0.2, 2.0), source.uniform(2.0, 6.0))), 2),
                shift_s=source.choice(SHIFTS_S) if trouble is Trouble.CLOCK else 0.0,
            )
        )
    by_time = sorted(acts, key=lambda act: act.at_s), sorted(faults, key=lambda fault: fault.at_s)
    return Plan(seed=seed, acts=tuple(by_time[0]), faults=tuple(by_time[1]))
