"""Decides which weights answer for a `model` string, and which replica of them. Pure: it is given what was found.

It refuses to know tables, engines and messages; the same candidates always give the same answer.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, replace

from services.inference.domain import BaseModel, Endpoint, ModelKind, TunedModel, Weights
from services.inference.lifecycle import EndpointState


class Refusal(enum.StrEnum):
    """Why a model string leads nowhere."""

    UNKNOWN = "unknown"
    BASE_MISSING = "base_missing"  # the adapter is there, the revision of its base is not
    ENDPOINT_NOT_READY = "endpoint_not_ready"


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Everything that carries the asked name in the caller's project or in the catalogue.

    `tuned_base` is the base of `tuned` in the revision it was trained on; `behind` are the candidates for the model that
    `endpoint` serves.
    """

    base: BaseModel | None = None
    tuned: TunedModel | None = None
    tuned_base: BaseModel | None = None
    endpoint: Endpoint | None = None
    behind: Candidates | None = None


@dataclass(frozen=True, kw_only=True)
class Route:
    """Weights that an engine holds, the adapter on top of them if any, and whose price applies.

    `owner` is empty for shared engines; an endpoint under one lease has engines of its own.
    """

    weights: Weights
    base_model: str
    adapter: Weights | None = None
    adapter_rank: int = 0
    takes_adapters: bool = True
    owner: str = ""
    gpu_indices: tuple[int, ...] = ()

    @property
    def revision(self) -> str:
        """Revision of the weights that answer."""
        return self.adapter.revision if self.adapter else self.weights.revision


@dataclass(frozen=True, kw_only=True)
class Replica:
    """One running engine for a route: its load, its limit and the adapters in its memory."""

    name: str
    ready: bool
    requests_unfinished: int
    requests_max: int
    adapters: frozenset[str] = frozenset()


def resolve(found: Candidates) -> Route | Refusal:
    """The route for a name. The catalogue wins over tuned models, and those over endpoints: a project cannot take a
    public name over, not even for itself."""
    if found.base is not None:
        return Route(weights=found.base.weights, base_model=found.base.model_id)
    if found.tuned is not None:
        return _tuned(found.tuned, found.tuned_base)
    if found.endpoint is not None:
        return _endpoint(found.endpoint, found.behind)
    return Refusal.UNKNOWN


def _tuned(tuned: TunedModel, base: BaseModel | None) -> Route | Refusal:
    if tuned.kind is ModelKind.FULL:
        return Route(weights=tuned.weights, base_model=tuned.base_model, takes_adapters=False)
    # An adapter on another revision of its base would answer, and answer wrongly.
    if base is None or base.weights.revision != tuned.base_revision:
        return Refusal.BASE_MISSING
    return Route(
        weights=base.weights, base_model=tuned.base_model, adapter=tuned.weights, adapter_rank=tuned.adapter_rank
    )


def _endpoint(endpoint: Endpoint, behind: Candidates | None) -> Route | Refusal:
    if endpoint.state != EndpointState.READY:
        return Refusal.ENDPOINT_NOT_READY
    # An endpoint serves a model, never another endpoint.
    inner = resolve(replace(behind, endpoint=None)) if behind is not None else Refusal.UNKNOWN
    if isinstance(inner, Refusal):
        return inner
    return replace(inner, owner=f"{endpoint.id}:{endpoint.lease_token}", gpu_indices=endpoint.device_indices)


def choose_replica(replicas: Iterable[Replica], adapter_revision: str | None = None) -> Replica | None:
    """The replica for the next call, None when none has room.

    One that holds the adapter wins while it has room, because loading it elsewhere would push another tenant's out; then
    the smallest share of its limit in use; then the name, so that the answer does not depend on the order given.
    """
    open_ones = [
        replica for replica in replicas if replica.ready and replica.requests_unfinished < replica.requests_max
    ]
    if not open_ones:
        return None
    return min(
        open_ones,
        key=lambda replica: (
            adapter_revision is not None and adapter_revision not in replica.adapters,
            replica.requests_unfinished / replica.requests_max,
            replica.name,
        ),
    )
