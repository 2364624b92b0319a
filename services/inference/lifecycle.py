"""The lifecycle of an endpoint as one table: event -> (allowed sources, destination). It does nothing by itself."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass


class EndpointState(enum.StrEnum):
    """Where an endpoint stands; STOPPED and FAILED hold no devices."""

    PENDING = "PENDING"
    STARTING = "STARTING"
    READY = "READY"
    STOPPING = "STOPPING"
    STOPPED = "STOPPED"
    FAILED = "FAILED"


class EndpointEvent(enum.StrEnum):
    """What can happen to an endpoint."""

    START = "start"
    ALLOCATE = "allocate"
    SERVE = "serve"
    LOSE = "lose"
    STOP = "stop"
    STOPPED = "stopped"
    FAIL = "fail"


@dataclass(frozen=True, kw_only=True)
class Transition:
    """From any of `sources` to `destination`."""

    sources: frozenset[EndpointState]
    destination: EndpointState


S = EndpointState
TRANSITIONS: Mapping[EndpointEvent, Transition] = {
    EndpointEvent.START: Transition(sources=frozenset({S.STOPPED, S.FAILED}), destination=S.PENDING),
    EndpointEvent.ALLOCATE: Transition(sources=frozenset({S.PENDING}), destination=S.STARTING),
    EndpointEvent.SERVE: Transition(sources=frozenset({S.STARTING}), destination=S.READY),
    # The devices or the engine are gone (a lost lease, a restart of this service): begin again.
    EndpointEvent.LOSE: Transition(sources=frozenset({S.STARTING, S.READY}), destination=S.PENDING),
    EndpointEvent.STOP: Transition(sources=frozenset({S.PENDING, S.STARTING, S.READY}), destination=S.STOPPING),
    EndpointEvent.STOPPED: Transition(sources=frozenset({S.STOPPING}), destination=S.STOPPED),
    EndpointEvent.FAIL: Transition(sources=frozenset({S.PENDING, S.STARTING, S.READY}), destination=S.FAILED),
}
DELETABLE = frozenset({S.STOPPED, S.FAILED})
HOLDING = frozenset({S.PENDING, S.STARTING, S.READY, S.STOPPING})
