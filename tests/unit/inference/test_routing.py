"""Which weights answer for a name, and which replica takes the call."""

from __future__ import annotations

import itertools
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from services.inference.domain import BaseModel, Endpoint, ModelKind, TunedModel, Weights
from services.inference.lifecycle import EndpointState
from services.inference.routing import Candidates, Refusal, Replica, Route, choose_replica, resolve

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def weights(revision: str) -> Weights:
    return Weights(revision=revision, key=f"models/{revision}", files=())


BASE = BaseModel(
    model_id="finemesh/demo-llama",
    weights=weights("rv_base"),
    architecture="LlamaForCausalLM",
    parameter_count=1,
    context_tokens_max=256,
    size_bytes=1,
    created_at=NOW,
)
ADAPTER = TunedModel(
    id="ml_1",
    project_id="proj_1",
    model_id="acme/support",
    kind=ModelKind.ADAPTER,
    base_model=BASE.model_id,
    base_revision="rv_base",
    weights=weights("rv_adapter"),
    adapter_rank=16,
    tuning_job="ft-1",
    lineage={},
    created_at=NOW,
)
FULL = replace(ADAPTER, kind=ModelKind.FULL, weights=weights("rv_full"), adapter_rank=0)
ENDPOINT = Endpoint(
    id="ep_1",
    project_id="proj_1",
    organization_id="org_1",
    endpoint_id="ep_1",
    model=ADAPTER.model_id,
    hardware_type="cpu",
    gpu_count=2,
    state=EndpointState.READY,
    status_message="",
    lease_token=7,
    device_indices=(2, 3),
    ready_at=NOW,
    stopped_at=None,
    created_at=NOW,
    billed_minutes=0,
    period_minutes=0,
)
BEHIND = Candidates(tuned=ADAPTER, tuned_base=BASE)


def test_a_base_model_answers_itself() -> None:
    assert resolve(Candidates(base=BASE)) == Route(weights=BASE.weights, base_model=BASE.model_id)


def test_an_adapter_answers_on_its_base() -> None:
    route = resolve(Candidates(tuned=ADAPTER, tuned_base=BASE))
    assert route == Route(weights=BASE.weights, base_model=BASE.model_id, adapter=ADAPTER.weights, adapter_rank=16)
    assert isinstance(route, Route)
    assert route.revision == "rv_adapter"


def test_a_fully_tuned_model_answers_itself_and_takes_no_adapters() -> None:
    route = resolve(Candidates(tuned=FULL))
    assert route == Route(weights=FULL.weights, base_model=BASE.model_id, takes_adapters=False)


def test_an_endpoint_serves_the_same_weights_on_devices_of_its_own() -> None:
    shared = resolve(BEHIND)
    assert isinstance(shared, Route)
    assert resolve(Candidates(endpoint=ENDPOINT, behind=BEHIND)) == replace(shared, owner="ep_1:7", gpu_indices=(2, 3))


@pytest.mark.parametrize("state", [state for state in EndpointState if state is not EndpointState.READY])
def test_an_endpoint_that_is_not_ready_takes_no_calls(state: EndpointState) -> None:
    found = Candidates(endpoint=replace(ENDPOINT, state=state), behind=BEHIND)
    assert resolve(found) is Refusal.ENDPOINT_NOT_READY


def test_nothing_found_is_unknown() -> None:
    assert resolve(Candidates()) is Refusal.UNKNOWN
    assert resolve(Candidates(endpoint=ENDPOINT)) is Refusal.UNKNOWN
    assert (
        resolve(Candidates(endpoint=ENDPOINT, behind=Candidates(endpoint=ENDPOINT, behind=BEHIND))) is Refusal.UNKNOWN
    )


def test_an_adapter_never_answers_on_another_revision_of_its_base() -> None:
    newer = replace(BASE, weights=weights("rv_newer"))
    assert resolve(Candidates(tuned=ADAPTER, tuned_base=newer)) is Refusal.BASE_MISSING
    assert resolve(Candidates(tuned=ADAPTER)) is Refusal.BASE_MISSING


def test_a_project_cannot_take_a_public_name_over() -> None:
    route = resolve(Candidates(base=BASE, tuned=FULL, endpoint=ENDPOINT, behind=BEHIND))
    assert route == resolve(Candidates(base=BASE))


def replica(name: str, load: int, *, limit: int = 10, ready: bool = True, adapters: str = "") -> Replica:
    return Replica(
        name=name, ready=ready, requests_unfinished=load, requests_max=limit, adapters=frozenset(adapters.split())
    )


@pytest.mark.parametrize(
    ("replicas", "adapter", "chosen"),
    [
        ([], None, None),
        ([replica("a", 0, ready=False), replica("b", 10)], None, None),
        ([replica("a", 3), replica("b", 2)], None, "b"),
        ([replica("a", 3, limit=30), replica("b", 2)], None, "a"),
        ([replica("b", 1), replica("a", 1)], None, "a"),
        ([replica("a", 0), replica("b", 9, adapters="rv_1 rv_2")], "rv_1", "b"),
        ([replica("a", 0), replica("b", 10, adapters="rv_1")], "rv_1", "a"),
        ([replica("a", 5, adapters="rv_1"), replica("b", 4, adapters="rv_1")], "rv_1", "b"),
    ],
)
def test_the_replica_with_the_adapter_then_the_least_loaded(
    replicas: list[Replica], adapter: str | None, chosen: str | None
) -> None:
    for order in itertools.permutations(replicas):
        answer = choose_replica(order, adapter)
        assert (answer.name if answer else None) == chosen
