"""The lifecycle of a tuning job as a table: event -> (allowed sources, destination).

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
    # The hold on its price is over while it waits.
    EXPIRE = "EXPIRE"
    # The attempt was lost or failed in a way that a new attempt may not.
    REQUEUE = "REQUEUE"
    # A cancellation where nothing runs.
    CANCEL_WAITING = "CANCEL_WAITING"
    # A cancellation where a node has to stop first.
    CANCEL_RUNNING = "CANCEL_RUNNING"
    # The cancelled attempt is over, stopped, failed or lost.
    STOP = "STOP"


@dataclass(frozen=True, kw_only=True)
class Rule:
    sources: frozenset[JobState]
    destination: JobState


INITIAL = JobState.VALIDATING
FINAL = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})
# A node works on the job, or is about to.
LEASED = frozenset({JobState.STARTING, JobState.RUNNING, JobState.CANCELLING})
# A started attempt reports; a cancelled one still reports the steps that it finished.
REPORTING = frozenset({JobState.RUNNING, JobState.CANCELLING})


def _rule(*sources: JobState, to: JobState) -> Rule:
    return Rule(sources=frozenset(sources), destination=to)


TABLE: dict[JobTransition, Rule] = {
    JobTransition.HELD: _rule(JobState.VALIDATING, to=JobState.QUEUED),
    JobTransition.REFUSE: _rule(JobState.VALIDATING, to=JobState.FAILED),
    JobTransition.PLACE: _rule(JobState.QUEUED, to=JobState.STARTING),
    JobTransition.START: _rule(JobState.STARTING, to=JobState.RUNNING),
    # A cancellation that comes after the last step comes too late: the work is done and the model ships.
    JobTransition.SUCCEED: _rule(JobState.RUNNING, JobState.CANCELLING, to=JobState.SUCCEEDED),
    JobTransition.FAIL: _rule(JobState.STARTING, JobState.RUNNING, to=JobState.FAILED),
    JobTransition.EXPIRE: _rule(JobState.QUEUED, to=JobState.FAILED),
    JobTransition.REQUEUE: _rule(JobState.STARTING, JobState.RUNNING, to=JobState.QUEUED),
    JobTransition.CANCEL_WAITING: _rule(JobState.VALIDATING, JobState.QUEUED, to=JobState.CANCELLED),
    JobTransition.CANCEL_RUNNING: _rule(JobState.STARTING, JobState.RUNNING, to=JobState.CANCELLING),
    JobTransition.STOP: _rule(JobState.CANCELLING, to=JobState.CANCELLED),
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
