"""The lifecycle of an endpoint as one table: event -> (allowed sources, destination). It does nothing by itself."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass


class EndpointState(enum.StrEnum):
    """Where an endpoint stands; STOPPED, FAILED and PARKED hold no devices."""

    PENDING = "PENDING"
    STARTING = "STARTING"
    READY = "READY"
    STOPPING = "STOPPING"
    STOPPED = "STOPPED"
    FAILED = "FAILED"
    # Nobody may spend for it; it starts by itself once somebody may.
    PARKED = "PARKED"


class EndpointEvent(enum.StrEnum):
    """What can happen to an endpoint."""

    START = "start"
    ALLOCATE = "allocate"
    SERVE = "serve"
    LOSE = "lose"
    STOP = "stop"
    STOPPED = "stopped"
    FAIL = "fail"
    PARK = "park"
    UNPARK = "unpark"


@dataclass(frozen=True, kw_only=True)
class Transition:
    """From any of `sources` to `destination`."""

    sources: frozenset[EndpointState]
    destination: EndpointState


S = EndpointState
TRANSITIONS: Mapping[EndpointEvent, Transition] = {
    EndpointEvent.START: Transition(sources=frozenset({S.STOPPED, S.FAILED, S.PARKED}), destination=S.PENDING),
    EndpointEvent.ALLOCATE: Transition(sources=frozenset({S.PENDING}), destination=S.STARTING),
    EndpointEvent.SERVE: Transition(sources=frozenset({S.STARTING}), destination=S.READY),
    # The devices or the engine are gone (a lost lease, a restart of this service): begin again.
    EndpointEvent.LOSE: Transition(sources=frozenset({S.STARTING, S.READY}), destination=S.PENDING),
    # Also a parked one: then it does not start by itself any more.
    EndpointEvent.STOP: Transition(
        sources=frozenset({S.PENDING, S.STARTING, S.READY, S.PARKED}), destination=S.STOPPING
    ),
    EndpointEvent.STOPPED: Transition(sources=frozenset({S.STOPPING}), destination=S.STOPPED),
    EndpointEvent.FAIL: Transition(sources=frozenset({S.PENDING, S.STARTING, S.READY}), destination=S.FAILED),
    # Nothing more may be spent: devices and engine are given back, model and settings stay.
    EndpointEvent.PARK: Transition(sources=frozenset({S.PENDING, S.STARTING, S.READY}), destination=S.PARKED),
    EndpointEvent.UNPARK: Transition(sources=frozenset({S.PARKED}), destination=S.PENDING),
}
DELETABLE = frozenset({S.STOPPED, S.FAILED, S.PARKED})
HOLDING = frozenset({S.PENDING, S.STARTING, S.READY, S.STOPPING})
