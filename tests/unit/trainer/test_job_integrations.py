"""The secrets of one attempt: asked for once when they come,
and again by whoever needs them after they could not be had."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from chassis.clock import ManualClock
from chassis.errors import Internal
from finemesh.nodes.v1 import node_pb2, node_service_pb2
from finemesh.tuning.v1 import tuning_secrets_pb2
from services.trainer.config import TrainerSettings
from services.trainer.integrations import job_integrations as module
from services.trainer.integrations.fetched_secrets import FetchedSecrets
from services.trainer.integrations.hub.repository import Repository
from services.trainer.integrations.job_integrations import JobIntegrations


class Scheduler:
    """Keeps the job's secrets to itself for the first `failures` questions."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.asked = 0

    async def FetchJobSecrets(
        self, request: node_service_pb2.FetchJobSecretsRequest, *, timeout: float
    ) -> node_service_pb2.FetchJobSecretsResponse:
        self.asked += 1
        if self.asked <= self.failures:
            raise Internal("INTERNAL", "a defect")
        return node_service_pb2.FetchJobSecretsResponse(secrets=tuning_secrets_pb2.TuningSecrets(hub_token="hf"))


@pytest.mark.parametrize("failures", [0, 1, 2])
async def test_a_push_asks_again_for_secrets_that_could_not_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    tokens: list[str] = []
    warnings: list[str] = []

    async def push(target: Repository, *rest: object, **named: object) -> dict[str, str]:
        tokens.append(target.token)
        return {"commit": "c1"}

    async def warn(code: str, message: str) -> None:
        warnings.append(message)

    monkeypatch.setattr(module, "push", push)
    assignment = node_pb2.Assignment()
    assignment.lease.tuning_job = "projects/p/tuningJobs/ft-1"
    assignment.spec.integrations.hub_push.repository = "acme/tuned"
    scheduler = Scheduler(failures)
    stub: Any = SimpleNamespace(FetchJobSecrets=scheduler.FetchJobSecrets)
    secrets = FetchedSecrets(assignment.lease, stub, TrainerSettings(), ManualClock())
    integrations = JobIntegrations(
        assignment.spec, secrets, TrainerSettings(), ManualClock(), job_id="ft-1", folder=tmp_path, warn=warn
    )
    integrations.open()
    pushes = [await integrations.push(tmp_path, [], "rv_1") for _ in range(3)]
    await integrations.abandon()
    await secrets.abandon()
    pushed = {"hub.repository": "acme/tuned", "hub.commit": "c1"}
    assert pushes == [{}] * failures + [pushed] * (3 - failures)
    assert tokens == ["hf"] * (3 - failures)
    assert scheduler.asked == failures + 1
    assert warnings == ["the model is not in acme/tuned: the job's secrets cannot be had"] * failures
