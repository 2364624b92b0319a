"""The lifecycle of a tuning job as a table: event -> (allowed sources, destination, guard).

It decides which transitions exist and nothing else: not when one happens, nor how it is stored.
"""

from dataclasses import dataclass
from enum import StrEnum


class JobState(StrEnum):
    VALIDATING = "VALIDATING"
    QUEUED = "QUEUED"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    CANCELLING = "CANCELLING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


class JobTransition(StrEnum):
    """What can happen to a job."""

    # Analysed, priced, and the price is held.
    HELD = "HELD"
    # Never runs: invalid data, too little credit, no price.
    REFUSE = "REFUSE"
    # Got devices and a lease.
    PLACE = "PLACE"
    # The node's process started.
    START = "START"
    # The model was exported and passed its parity gate.
    SUCCEED = "SUCCEED"
    # Ended with an error and no further attempt makes sense.
    FAIL = "FAIL"
    # While it waits the hold on its price is over, or it turns out that it can never be placed.
    EXPIRE = "EXPIRE"
    # The attempt was lost or failed in a way that a new attempt may not.
    REQUEUE = "REQUEUE"
    # A cancellation where nothing runs.
    CANCEL_WAITING = "CANCEL_WAITING"
    # A cancellation where a node has to stop first.
    CANCEL_RUNNING = "CANCEL_RUNNING"
    # The cancelled attempt is over, stopped, failed or lost.
    STOP = "STOP"


class Guard(StrEnum):
    """What has to be in force, besides the state, for the transition to happen."""

    STATE = "state"
    # The claim of the worker that analyses and prices the job.
    CLAIM = "claim"
    # The lease of the attempt that reports.
    LEASE = "lease"


@dataclass(frozen=True, kw_only=True)
class Rule:
    sources: frozenset[JobState]
    destination: JobState
    guard: Guard


INITIAL = JobState.VALIDATING
FINAL = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})
# A node works on the job, or is about to.
LEASED = frozenset({JobState.STARTING, JobState.RUNNING, JobState.CANCELLING})
# A started attempt reports; a cancelled one still reports the steps that it finished.
REPORTING = frozenset({JobState.RUNNING, JobState.CANCELLING})


def _rule(*sources: JobState, to: JobState, guard: Guard = Guard.STATE) -> Rule:
    return Rule(sources=frozenset(sources), destination=to, guard=guard)


TABLE: dict[JobTransition, Rule] = {
    JobTransition.HELD: _rule(JobState.VALIDATING, to=JobState.QUEUED, guard=Guard.CLAIM),
    JobTransition.REFUSE: _rule(JobState.VALIDATING, to=JobState.FAILED, guard=Guard.CLAIM),
    JobTransition.PLACE: _rule(JobState.QUEUED, to=JobState.STARTING),
    JobTransition.START: _rule(JobState.STARTING, to=JobState.RUNNING, guard=Guard.LEASE),
    # A cancellation that comes after the last step comes too late: the work is done and the model ships.
    JobTransition.SUCCEED: _rule(JobState.RUNNING, JobState.CANCELLING, to=JobState.SUCCEEDED, guard=Guard.LEASE),
    JobTransition.FAIL: _rule(JobState.STARTING, JobState.RUNNING, to=JobState.FAILED, guard=Guard.LEASE),
    JobTransition.EXPIRE: _rule(JobState.QUEUED, to=JobState.FAILED),
    JobTransition.REQUEUE: _rule(JobState.STARTING, JobState.RUNNING, to=JobState.QUEUED, guard=Guard.LEASE),
    JobTransition.CANCEL_WAITING: _rule(JobState.VALIDATING, JobState.QUEUED, to=JobState.CANCELLED),
    JobTransition.CANCEL_RUNNING: _rule(JobState.STARTING, JobState.RUNNING, to=JobState.CANCELLING),
    JobTransition.STOP: _rule(JobState.CANCELLING, to=JobState.CANCELLED, guard=Guard.LEASE),
}

# After these another job may be placed: one came into the queue or left it, or its devices are free.
MOVES_QUEUE = frozenset(JobTransition) - {
    JobTransition.REFUSE,
    JobTransition.PLACE,
    JobTransition.START,
    JobTransition.CANCEL_RUNNING,
}


def is_allowed(transition: JobTransition, source: JobState) -> bool:
    return source in TABLE[transition].sources


def render_chart() -> str:
    """The table as a mermaid state diagram; docs/leases.md shows exactly this text."""
    lines = ["stateDiagram-v2", f"    [*] --> {INITIAL}"]
    for transition, rule in TABLE.items():
        lines += [f"    {source} --> {rule.destination}: {transition}" for source in JobState if source in rule.sources]
    lines += [f"    {state} --> [*]" for state in JobState if state in FINAL]
    return "\n".join(lines)
