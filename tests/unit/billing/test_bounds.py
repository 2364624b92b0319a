"""Claims that cannot be true are refused before anything is priced or booked."""

import dataclasses
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from services.billing.limits import FactLimits
from services.billing.usage import bounds
from services.billing.usage.bounds import FactInvalid
from services.billing.usage.records import ClusterFact, EndpointFact, InferenceFact, TrainingFact, UsageKind

NOW = datetime(2026, 11, 23, tzinfo=UTC)
LIMITS = FactLimits()
OWNER: dict[str, Any] = {"organization_id": "o", "project_id": "p", "usage_time": NOW}
TRAINING = TrainingFact(
    work_key="ft-1:train:0-10",
    resource="projects/p/tuningJobs/ft-1",
    kind=UsageKind.TRAINING_TOKENS,
    start_step=0,
    end_step=10,
    tokens=100,
    **OWNER,
)
INFERENCE = InferenceFact(
    work_key="gen-1", resource="acme/bot", base_model="m", input_tokens=1, output_tokens=0, **OWNER
)
ENDPOINT = EndpointFact(
    work_key="ep-1:1:0", resource="projects/p/endpoints/ep-1", hardware_type="cpu", device_count=1, minute=0, **OWNER
)

CLUSTER = ClusterFact(
    work_key="cl-1:1:0", resource="projects/p/clusters/cl-1", hardware_type="cpu", node_count=1, hour=0, **OWNER
)


def test_plausible_claims_pass() -> None:
    bounds.check_training(TRAINING, "ft-1", NOW, LIMITS)
    bounds.check_inference(INFERENCE, NOW, LIMITS)
    bounds.check_endpoint(ENDPOINT, NOW, LIMITS)
    bounds.check_cluster(CLUSTER, NOW, LIMITS)


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": -1},
        {"tokens": 10**13},
        {"start_step": -1},
        {"end_step": 0},
        {"start_step": 11},
        {"end_step": 10**10},
        {"work_key": ""},
        {"work_key": "ft-2:train:0-10"},
        {"work_key": "ft-1:" + "x" * 300},
        # One piece of work has one key: another one would be paid a second time.
        {"work_key": "ft-1:train:0-20"},
        {"work_key": "ft-1:train:0-10:again"},
        {"work_key": "ft-1:train:00-10"},
        {"kind": UsageKind.EVALUATION_TOKENS},
        {"organization_id": ""},
        {"project_id": "a\0b"},
        # No invoice could be named after these.
        {"organization_id": "acme corp"},
        {"organization_id": "a/b"},
        {"organization_id": ".."},
        {"organization_id": "o" * 129},
        {"project_id": "acme corp"},
        {"usage_time": datetime(1970, 1, 1, tzinfo=UTC)},
        {"usage_time": NOW + timedelta(hours=2)},
    ],
)
def test_training_claims_that_cannot_be_true(change: dict[str, Any]) -> None:
    with pytest.raises(FactInvalid):
        bounds.check_training(dataclasses.replace(TRAINING, **change), "ft-1", NOW, LIMITS)


EVALUATION = dataclasses.replace(
    TRAINING, work_key="ft-1:evaluate:3", kind=UsageKind.EVALUATION_TOKENS, start_step=3, end_step=3
)


@pytest.mark.parametrize(
    "key", ["ft-1:evaluate:4", "ft-1:evaluate:03", "ft-1:evaluate:3-3", "ft-1:train:3-3", "ft-1:x:3"]
)
def test_an_evaluation_has_the_key_of_its_number(key: str) -> None:
    bounds.check_training(EVALUATION, "ft-1", NOW, LIMITS)
    with pytest.raises(FactInvalid, match="work key"):
        bounds.check_training(dataclasses.replace(EVALUATION, work_key=key), "ft-1", NOW, LIMITS)


@pytest.mark.parametrize("key", ["gen-1:128-300", "gen-1:0-172", "gen-1:301-128"])
def test_a_part_of_a_call_has_the_key_of_its_tokens(key: str) -> None:
    part = dataclasses.replace(INFERENCE, work_key="gen-1:128-301", output_tokens=173)
    bounds.check_inference(part, NOW, LIMITS)
    with pytest.raises(FactInvalid, match="work key"):
        bounds.check_inference(dataclasses.replace(part, work_key=key), NOW, LIMITS)


@pytest.mark.parametrize("change", [{"input_tokens": -1}, {"output_tokens": 10**13}, {"base_model": ""}])
def test_inference_claims_that_cannot_be_true(change: dict[str, Any]) -> None:
    with pytest.raises(FactInvalid):
        bounds.check_inference(dataclasses.replace(INFERENCE, **change), NOW, LIMITS)


@pytest.mark.parametrize(
    "change",
    [
        {"device_count": 0},
        {"device_count": 10**6},
        {"minute": -1},
        {"hardware_type": ""},
        {"minute": 1},
        {"work_key": "ep-2:1:0"},
        {"work_key": "ep-1:0"},
        {"work_key": "ep-1::0"},
        {"work_key": "ep-1:x:0"},
        {"work_key": "ep-1:1:00"},
        {"resource": "projects/q/endpoints/ep-1"},
        {"resource": "projects/p/clusters/ep-1"},
        {"resource": "projects/p/endpoints/a/ep-1"},
        {"resource": "ep-1"},
    ],
)
def test_endpoint_claims_that_cannot_be_true(change: dict[str, Any]) -> None:
    with pytest.raises(FactInvalid):
        bounds.check_endpoint(dataclasses.replace(ENDPOINT, **change), NOW, LIMITS)


@pytest.mark.parametrize(
    "change",
    [
        {"node_count": 0},
        {"node_count": 10**6},
        {"hour": -1},
        {"hardware_type": ""},
        {"hour": 1},
        {"work_key": "cl-2:1:0"},
        {"resource": "projects/q/clusters/cl-1"},
    ],
)
def test_cluster_claims_that_cannot_be_true(change: dict[str, Any]) -> None:
    with pytest.raises(FactInvalid):
        bounds.check_cluster(dataclasses.replace(CLUSTER, **change), NOW, LIMITS)


def test_a_clock_that_is_a_little_ahead_is_believed() -> None:
    bounds.check_endpoint(dataclasses.replace(ENDPOINT, usage_time=NOW + timedelta(minutes=30)), NOW, LIMITS)
