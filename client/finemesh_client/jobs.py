"""Tuning jobs: quote, create, follow, cancel. It knows the contract, not how a job is run."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from typing import cast

from finemesh.tuning.v1 import (
    tuning_job_event_pb2,
    tuning_job_pb2,
    tuning_limits_pb2,
    tuning_secrets_pb2,
    tuning_service_pb2,
    tuning_service_pb2_grpc,
)
from finemesh_client.errors import Unavailable
from finemesh_client.transport import Transport

FINAL_STATES = frozenset(
    {
        tuning_job_pb2.TUNING_JOB_STATE_SUCCEEDED,
        tuning_job_pb2.TUNING_JOB_STATE_FAILED,
        tuning_job_pb2.TUNING_JOB_STATE_CANCELLED,
    }
)
# A quote may have to tokenise the whole dataset first.
QUOTE_TIMEOUT_S = 600.0
WATCH_RETRY_S = 1.0


class Jobs:
    """Tuning jobs of the caller's project."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._stub = tuning_service_pb2_grpc.TuningServiceStub(transport.channel)

    async def quote(self, spec: tuning_job_pb2.TuningSpec) -> tuning_service_pb2.QuoteTuningJobResponse:
        """The exact price of a job without creating it, and in `outlook` its steps and what will surprise."""
        request = tuning_service_pb2.QuoteTuningJobRequest(spec=spec)
        answer = await self._transport.unary(self._stub.QuoteTuningJob, request, safe=True, timeout_s=QUOTE_TIMEOUT_S)
        return cast(tuning_service_pb2.QuoteTuningJobResponse, answer)

    async def limits(self, model: str) -> tuning_limits_pb2.TuningLimits:
        """What may be asked for a base model, or for the base of a job or model to continue."""
        request = tuning_service_pb2.GetTuningLimitsRequest(model=model)
        answer = await self._transport.unary(self._stub.GetTuningLimits, request, safe=True)
        return cast(tuning_limits_pb2.TuningLimits, answer.limits)

    async def create(
        self,
        spec: tuning_job_pb2.TuningSpec,
        *,
        request_id: str | None = None,
        secrets: tuning_secrets_pb2.TuningSecrets | None = None,
    ) -> tuning_job_pb2.TuningJob:
        """Creates a job and returns at once. Repeated with the same request id it returns the same job, with the
        `secrets` of its integrations that came first; no answer ever shows them."""
        request = tuning_service_pb2.CreateTuningJobRequest(
            spec=spec, request_id=request_id or uuid.uuid4().hex, secrets=secrets
        )
        answer = await self._transport.unary(self._stub.CreateTuningJob, request, safe=True)
        return cast(tuning_job_pb2.TuningJob, answer.tuning_job)

    async def get(self, name: str) -> tuning_job_pb2.TuningJob:
        """One job."""
        request = tuning_service_pb2.GetTuningJobRequest(name=name)
        answer = await self._transport.unary(self._stub.GetTuningJob, request, safe=True)
        return cast(tuning_job_pb2.TuningJob, answer.tuning_job)

    def list(self, limit: int | None = None) -> AsyncIterator[tuning_job_pb2.TuningJob]:
        """The project's jobs, newest first."""
        return self._transport.pages(
            self._stub.ListTuningJobs, tuning_service_pb2.ListTuningJobsRequest(), "tuning_jobs", limit
        )

    async def cancel(self, name: str) -> tuning_job_pb2.TuningJob:
        """Asks for a cancellation and returns at once."""
        request = tuning_service_pb2.CancelTuningJobRequest(name=name)
        answer = await self._transport.unary(self._stub.CancelTuningJob, request, safe=True)
        return cast(tuning_job_pb2.TuningJob, answer.tuning_job)

    async def watch(
        self, name: str, after_sequence: int = 0
    ) -> AsyncIterator[tuning_service_pb2.WatchTuningJobResponse]:
        """The job and its new events until it ends. A broken stream is taken up again after the last event seen."""
        seen = after_sequence
        while True:
            request = tuning_service_pb2.WatchTuningJobRequest(name=name, after_sequence=seen)
            try:
                async for message in self._transport.stream(self._stub.WatchTuningJob, request):
                    if message.events:
                        seen = message.events[-1].sequence
                    yield message
                    if message.tuning_job.state in FINAL_STATES:
                        return
            except Unavailable:
                await asyncio.sleep(WATCH_RETRY_S)

    async def wait(self, name: str) -> tuning_job_pb2.TuningJob:
        """The job once it has ended."""
        job = await self.get(name)
        if job.state in FINAL_STATES:
            return job
        async for message in self.watch(name):
            job = message.tuning_job
        return job

    def events(self, name: str, limit: int | None = None) -> AsyncIterator[tuning_job_event_pb2.TuningJobEvent]:
        """A job's history, oldest first."""
        return self._transport.pages(
            self._stub.ListTuningJobEvents, tuning_service_pb2.ListTuningJobEventsRequest(parent=name), "events", limit
        )

    def checkpoints(self, name: str, limit: int | None = None) -> AsyncIterator[tuning_job_event_pb2.Checkpoint]:
        """A job's committed checkpoints, oldest first."""
        return self._transport.pages(
            self._stub.ListCheckpoints, tuning_service_pb2.ListCheckpointsRequest(parent=name), "checkpoints", limit
        )
