"""The lifecycle's table, looked at from every state and every transition, and the chart that the docs show."""

import itertools
from pathlib import Path

import pytest

from services.scheduler.jobs.lifecycle import (
    FINAL,
    INITIAL,
    LEASED,
    TABLE,
    JobState,
    JobTransition,
    is_allowed,
    render_chart,
)

ROOT = Path(__file__).parents[3]

ALLOWED = {
    (JobState.VALIDATING, JobTransition.HELD): JobState.QUEUED,
    (JobState.VALIDATING, JobTransition.REFUSE): JobState.FAILED,
    (JobState.VALIDATING, JobTransition.CANCEL_WAITING): JobState.CANCELLED,
    (JobState.QUEUED, JobTransition.PLACE): JobState.STARTING,
    (JobState.QUEUED, JobTransition.EXPIRE): JobState.FAILED,
    (JobState.QUEUED, JobTransition.CANCEL_WAITING): JobState.CANCELLED,
    (JobState.STARTING, JobTransition.START): JobState.RUNNING,
    (JobState.STARTING, JobTransition.FAIL): JobState.FAILED,
    (JobState.STARTING, JobTransition.REQUEUE): JobState.QUEUED,
    (JobState.STARTING, JobTransition.CANCEL_RUNNING): JobState.CANCELLING,
    (JobState.RUNNING, JobTransition.SUCCEED): JobState.SUCCEEDED,
    (JobState.RUNNING, JobTransition.FAIL): JobState.FAILED,
    (JobState.RUNNING, JobTransition.REQUEUE): JobState.QUEUED,
    (JobState.RUNNING, JobTransition.CANCEL_RUNNING): JobState.CANCELLING,
    (JobState.CANCELLING, JobTransition.SUCCEED): JobState.SUCCEEDED,
    (JobState.CANCELLING, JobTransition.STOP): JobState.CANCELLED,
}


@pytest.mark.parametrize(("state", "transition"), itertools.product(JobState, JobTransition))
def test_every_pair_of_state_and_transition(state: JobState, transition: JobTransition) -> None:
    destination = ALLOWED.get((state, transition))
    assert is_allowed(transition, state) == (destination is not None)
    if destination is not None:
        assert TABLE[transition].destination is destination


def test_final_states_end() -> None:
    for transition, state in itertools.product(JobTransition, FINAL):
        assert not is_allowed(transition, state)


def test_every_other_state_can_be_left_and_reaches_an_end() -> None:
    edges = {(source, rule.destination) for rule in TABLE.values() for source in rule.sources}
    for start in set(JobState) - FINAL:
        reached, frontier = {start}, {start}
        while frontier:
            frontier = {to for source, to in edges if source in frontier} - reached
            reached |= frontier
        assert reached & FINAL, start


def test_every_state_is_reachable() -> None:
    reached = {INITIAL} | {rule.destination for rule in TABLE.values()}
    assert reached == set(JobState)


def test_only_leased_states_end_a_lease() -> None:
    for transition in (JobTransition.REQUEUE, JobTransition.FAIL, JobTransition.STOP, JobTransition.SUCCEED):
        assert TABLE[transition].sources <= LEASED


def test_the_documented_chart_is_the_table() -> None:
    text = (ROOT / "docs" / "leases.md").read_text(encoding="utf-8")
    charts = [block.split("```", 1)[0].strip() for block in text.split("```mermaid\n")[1:]]
    assert render_chart() in charts
