"""The endpoint's table is what the documentation draws, and no state is a trap."""

from __future__ import annotations

import re
from pathlib import Path

from services.inference.endpoints.lifecycle import DELETABLE, HOLDING, TRANSITIONS, EndpointState

CHART = Path(__file__).parents[3] / "docs" / "serving.md"
ARROW = re.compile(r"^ +(\w+) --> (\w+): (\w+)$", re.MULTILINE)


def test_the_chart_is_the_table() -> None:
    drawn = set(ARROW.findall(CHART.read_text(encoding="utf-8")))
    table = {
        (str(source), str(transition.destination), str(event))
        for event, transition in TRANSITIONS.items()
        for source in transition.sources
    }
    assert drawn == table


def test_every_state_can_be_reached_and_left() -> None:
    reached = {EndpointState.PENDING} | {transition.destination for transition in TRANSITIONS.values()}
    left = {source for transition in TRANSITIONS.values() for source in transition.sources}
    assert reached == left == set(EndpointState)


def test_only_states_without_devices_can_be_deleted() -> None:
    assert frozenset(EndpointState) == DELETABLE | HOLDING
    assert not DELETABLE & HOLDING
