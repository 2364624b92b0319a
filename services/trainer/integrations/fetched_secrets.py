"""Fetches the secrets of a job under its lease and keeps them in memory. Not pure: gRPC.

It knows no service that the secrets are for.
"""

import asyncio

import structlog

from chassis.clock import Clock
from chassis.errors import DomainError
from chassis.rpc.retry import retry
from finemesh.nodes.v1 import node_pb2, node_service_pb2, node_service_pb2_grpc
from finemesh.tuning.v1 import tuning_secrets_pb2
from services.trainer.config import TrainerSettings

log = structlog.get_logger()

_FETCH_ATTEMPTS_MAX = 8


class FetchedSecrets:
    """`get` fetches once for all who ask. When that fails, the next `get` tries again. `abandon` ends a fetch."""

    def __init__(
        self,
        lease: node_pb2.Lease,
        stub: "node_service_pb2_grpc.NodeServiceAsyncStub",
        settings: TrainerSettings,
        clock: Clock,
    ) -> None:
        self._lease = lease
        self._stub = stub
        self._settings = settings
        self._clock = clock
        self._fetching: asyncio.Task[tuning_secrets_pb2.TuningSecrets | None] | None = None

    def begin(self) -> None:
        """Starts to fetch, and waits for nothing."""
        self._fetch_once()

    async def get(self) -> tuning_secrets_pb2.TuningSecrets | None:
        """None when they cannot be had."""
        return await self._fetch_once()

    async def abandon(self) -> None:
        if self._fetching is not None:
            self._fetching.cancel()
            await asyncio.wait({self._fetching})

    def _fetch_once(self) -> asyncio.Task[tuning_secrets_pb2.TuningSecrets | None]:
        if self._fetching is None:
            self._fetching = asyncio.create_task(self._fetch())
        return self._fetching

    async def _fetch(self) -> tuning_secrets_pb2.TuningSecrets | None:
        request = node_service_pb2.FetchJobSecretsRequest(
            lease_token=self._lease.token, tuning_job=self._lease.tuning_job
        )
        timeout_s = self._settings.report_timeout_s
        try:
            answer = await retry(
                lambda: self._stub.FetchJobSecrets(request, timeout=timeout_s),
                clock=self._clock,
                attempts=_FETCH_ATTEMPTS_MAX,
            )
        except DomainError as error:
            log.warning("secrets_not_fetched", job=self._lease.tuning_job, error=str(error))
            self._fetching = None
            return None
        found: tuning_secrets_pb2.TuningSecrets = answer.secrets
        return found
