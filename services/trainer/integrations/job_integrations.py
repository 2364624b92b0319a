"""The integrations that a job asks for: its curves in Weights & Biases, its model in a repository. Not pure: programs.

None of them can make the job fail. A job without integrations pays nothing for this.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from google.protobuf.json_format import MessageToDict

from chassis.clock import Clock
from finemesh.tuning.v1 import tuning_job_pb2 as tuning
from services.trainer.config import TrainerSettings
from services.trainer.integrations.fetched_secrets import FetchedSecrets
from services.trainer.integrations.hub.repository import Repository, push
from services.trainer.integrations.programs import HOME
from services.trainer.integrations.wandb.curves import Curves, Destination, Warn

PUSH_FAILED = "HUB_PUSH_FAILED"


class JobIntegrations:
    """`open`, then `add` and `push`, then `close`. `abandon` may be called at any time and any number of times."""

    def __init__(
        self,
        spec: tuning.TuningSpec,
        secrets: FetchedSecrets,
        settings: TrainerSettings,
        clock: Clock,
        *,
        job_id: str,
        folder: Path,
        warn: Warn,
    ) -> None:
        self._spec = spec
        self._secrets = secrets
        self._settings = settings
        self._clock = clock
        self._job_id = job_id
        self._home = folder / HOME
        self._warn = warn
        self._curves: Curves | None = None

    def open(self) -> None:
        """Never waits; without integrations it does nothing."""
        asked = self._spec.integrations
        if asked.HasField("wandb") or asked.HasField("hub_push"):
            self._secrets.begin()
        if asked.HasField("wandb"):
            self._curves = Curves(self._destination(), self._home, self._warn)
            self._curves.begin(self._wandb_key)

    def add(self, metrics: Iterable[tuning.TuningProgress]) -> None:
        if self._curves is not None:
            self._curves.add(metrics)

    async def push(self, folder: Path, names: Sequence[str], revision: str) -> dict[str, str]:
        """What the model's lineage says of it; empty when nothing was pushed."""
        asked = self._spec.integrations
        if not asked.HasField("hub_push"):
            return {}
        secrets, repository = await self._secrets.get(), asked.hub_push.repository
        token = secrets.hub_token if secrets else ""
        if not token:
            why = "no token is known for this job" if secrets else "the job's secrets cannot be had"
            await self._warn(PUSH_FAILED, f"the model is not in {repository}: {why}")
            return {}
        target = Repository(
            endpoint=self._settings.hub_endpoint,
            name=repository,
            token=token,
            seconds_max=self._settings.hub_push_s_max,
            attempts_max=self._settings.hub_push_attempts_max,
        )
        message = f"{self._job_id} {revision}"
        pushed = await push(target, folder, names, message=message, home=self._home, clock=self._clock)
        if "error" in pushed:
            why = f"{pushed['error']}; download it and push it again"
            await self._warn(PUSH_FAILED, f"the model is not in {repository}: {why}")
            return {}
        return {"hub.repository": repository, "hub.commit": pushed["commit"]}

    async def close(self) -> None:
        """Within its time the curves are complete."""
        if self._curves is not None:
            await self._curves.close()

    async def abandon(self) -> None:
        if self._curves is not None:
            await self._curves.abandon()

    async def _wandb_key(self) -> str:
        secrets = await self._secrets.get()
        return secrets.wandb_api_key if secrets else ""

    def _destination(self) -> Destination:
        settings = self._settings
        config = MessageToDict(self._spec, preserving_proto_field_name=True)
        config.pop("integrations")
        return Destination(
            run=self._spec.integrations.wandb,
            run_id=self._job_id,
            config=config,
            # Files of runs that go nowhere else are kept; the others are gone with the attempt.
            folder=settings.data_dir if settings.wandb_offline else self._home,
            offline=settings.wandb_offline,
            init_timeout_s=settings.wandb_init_s_max,
            finish_s_max=settings.wandb_finish_s_max,
            points_max=settings.wandb_points_max,
        )
