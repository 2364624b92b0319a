"""Everything outside of the mesh that one attempt tells of itself. A job without integrations pays nothing for it.

It fetches the job's secrets under the lease, once unless they cannot be had, keeps them in memory, and hands each to the one program that needs it.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import structlog
from google.protobuf.json_format import MessageToDict

from chassis.clock import Clock
from chassis.errors import DomainError, Unavailable
from chassis.rpc.retry import retry
from finemesh.nodes.v1 import node_pb2, node_service_pb2, node_service_pb2_grpc
from finemesh.tuning.v1 import tuning_job_pb2, tuning_secrets_pb2
from services.trainer.config import TrainerSettings
from services.trainer.event_map import ProgressReport
from services.trainer.outside.pulling import Pulled, Source, pull
from services.trainer.outside.pushing import FAILED, Target, push
from services.trainer.outside.telling import Destination, Telling
from services.trainer.spec_map import job_id_of, kind_of
from services.trainer.transfer import StoredFile

log = structlog.get_logger()

_FETCH_ATTEMPTS_MAX = 8
HOME = "outside"

Warn = Callable[[str, str], Awaitable[None]]


class Outside:
    """`open`, then `tell` and `push`, then `close`; `abandon` is right at any time and any number of times."""

    def __init__(
        self,
        assignment: node_pb2.Assignment,
        stub: "node_service_pb2_grpc.NodeServiceAsyncStub",
        settings: TrainerSettings,
        clock: Clock,
        *,
        folder: Path,
        warn: Warn,
    ) -> None:
        self._lease = assignment.lease
        self._spec = assignment.spec
        self._stub = stub
        self._settings = settings
        self._clock = clock
        self._folder = folder
        self._warn = warn
        self._secrets: asyncio.Task[tuning_secrets_pb2.TuningSecrets | None] | None = None
        self._telling: Telling | None = None

    def open(self) -> None:
        """Never waits; without integrations it does nothing."""
        asked = self._spec.integrations
        if asked.HasField("wandb") or asked.HasField("hub_push"):
            self._known()
        if asked.HasField("wandb"):
            self._telling = Telling(self._destination(), self._folder / HOME, self._warn)
            self._telling.begin(self._wandb_key)

    def tell(self, report: ProgressReport) -> None:
        if self._telling is not None:
            self._telling.tell(report.metrics)

    async def pull(self, start: tuning_job_pb2.HubStart, folder: Path, bytes_max: int) -> Pulled:
        """The weights to start from, in `folder`. DomainError when there is no run without them."""
        settings = self._settings
        source = Source(
            endpoint=settings.hub_endpoint,
            start=start,
            kind=kind_of(self._spec),
            bytes_max=bytes_max,
            seconds_max=settings.hub_pull_s_max,
            attempts_max=settings.hub_pull_attempts_max,
        )
        secrets = await self._known()
        if secrets is None:
            raise Unavailable("DEPENDENCY_UNAVAILABLE", "the job's secrets cannot be had")
        return await pull(source, secrets.hub_token, folder, home=self._folder / HOME, clock=self._clock)

    async def push(self, folder: Path, files: Sequence[StoredFile], revision: str) -> dict[str, str]:
        """What the model's lineage says of it; empty when nothing was pushed."""
        asked = self._spec.integrations
        if not asked.HasField("hub_push"):
            return {}
        secrets, repository = await self._known(), asked.hub_push.repository
        token = secrets.hub_token if secrets else ""
        settings = self._settings
        if not token:
            why = "no token is known for this job" if secrets else "the job's secrets cannot be had"
            await self._warn(FAILED, f"the model is not in {repository}: {why}")
            return {}
        target = Target(
            endpoint=settings.hub_endpoint,
            repository=repository,
            seconds_max=settings.hub_push_s_max,
            attempts_max=settings.hub_push_attempts_max,
        )
        message = f"{job_id_of(self._lease.tuning_job)} {revision}"
        home = self._folder / HOME
        told = await push(target, token, folder, files, message=message, home=home, clock=self._clock)
        if "error" in told:
            await self._warn(
                FAILED, f"the model is not in {repository}: {told['error']}; download it and push it again"
            )
            return {}
        return {"hub.repository": repository, "hub.commit": told["commit"]}

    async def close(self) -> None:
        """Within its time the curves are complete."""
        if self._telling is not None:
            await self._telling.close()

    async def abandon(self) -> None:
        if self._telling is not None:
            await self._telling.abandon()
        if self._secrets is not None:
            self._secrets.cancel()
            await asyncio.wait({self._secrets})

    async def _wandb_key(self) -> str:
        secrets = await self._known()
        return secrets.wandb_api_key if secrets else ""

    def _known(self) -> asyncio.Task[tuning_secrets_pb2.TuningSecrets | None]:
        """Fetched once, by whoever needs them first; None when they cannot be had, and whoever needs them next asks again."""
        if self._secrets is None:
            self._secrets = asyncio.create_task(self._fetch())
        return self._secrets

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
            log.warning("the job's secrets cannot be had", job=self._lease.tuning_job, error=str(error))
            self._secrets = None
            return None
        found: tuning_secrets_pb2.TuningSecrets = answer.secrets
        return found

    def _destination(self) -> Destination:
        settings = self._settings
        config = MessageToDict(self._spec, preserving_proto_field_name=True)
        config.pop("integrations")
        return Destination(
            run=self._spec.integrations.wandb,
            run_id=job_id_of(self._lease.tuning_job),
            config=config,
            # Files of runs that go nowhere else are kept; the others are gone with the attempt.
            folder=settings.data_dir if settings.wandb_offline else self._folder / HOME,
            offline=settings.wandb_offline,
            init_timeout_s=settings.wandb_init_s_max,
            finish_s_max=settings.wandb_finish_s_max,
            points_max=settings.wandb_points_max,
        )
