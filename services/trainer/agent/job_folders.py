"""Cleans the folders of ended jobs that the scheduler hands out. Not pure: gRPC, the artifact store.

What stays is the scheduler's word: models whole, and of checkpoints the files that another run may start from.
"""

import asyncio
from typing import Any

import structlog

from chassis.backoff import Backoff
from chassis.clock import Clock
from chassis.errors import DomainError, InvalidArgument
from chassis.names import parse_name
from chassis.objects.object_keys import checked_path, key_of
from chassis.objects.object_store import ObjectStore
from chassis.rounds import run_rounds
from finemesh.nodes.v1 import node_service_pb2
from finemesh.tuning.v1 import tuning_job_pb2
from services.trainer.artifacts.convert import digests_from_proto
from services.trainer.config import TrainerSettings
from services.trainer.inputs.fetch import is_start_weight

log = structlog.get_logger()

LIST_BATCH_MAX = 1000


class JobFolders:
    """`run` in the background; it does nothing before `begin`."""

    def __init__(self, stub: Any, store: ObjectStore, settings: TrainerSettings, clock: Clock) -> None:
        self._stub = stub
        self._store = store
        self._settings = settings
        self._clock = clock
        self._begun = asyncio.Event()

    def begin(self) -> None:
        """The scheduler knows this node."""
        self._begun.set()

    async def run(self) -> None:
        await self._begun.wait()
        await run_rounds(
            "job_folders",
            self.clean_some,
            wait=lambda: self._clock.sleep(self._settings.folder_interval_s),
            clock=self._clock,
            backoff=Backoff(
                first_s=min(1.0, self._settings.folder_interval_s), last_s=self._settings.folder_interval_s
            ),
            is_passing=lambda error: isinstance(error, DomainError),
        )

    async def clean_some(self) -> bool:
        """What is due now, a few folders at most; True when one was cleaned. One that fails is handed out again later,
        to anybody, and holds up no other."""
        request = node_service_pb2.ClaimJobFoldersRequest(node=self._settings.node_name)
        answer = await self._stub.ClaimJobFolders(request, timeout=self._settings.report_timeout_s)
        cleaned = 0
        for folder in answer.folders:
            try:
                await self._clean(folder)
            except DomainError as error:
                log.warning("job_folder_not_cleaned", job=folder.tuning_job, error=str(error))
                continue
            done = node_service_pb2.FinishJobFolderRequest(
                node=self._settings.node_name, tuning_job=folder.tuning_job, claim=folder.claim
            )
            await self._stub.FinishJobFolder(done, timeout=self._settings.report_timeout_s)
            cleaned += 1
        return cleaned > 0

    async def _clean(self, folder: node_service_pb2.JobFolder) -> None:
        prefix, kept = checked_prefix(folder), kept_keys(folder)
        found = [key async for key in self._store.list_keys(prefix, batch_max=LIST_BATCH_MAX)]
        doomed = [key for key in found if key not in kept]
        for key in doomed:
            if not key.startswith(prefix):
                raise InvalidArgument("INVALID_FIELD", f"{key} is not in the folder {prefix}")
            await self._store.remove(checked_path(key))
        await self._store.tidy(prefix)
        log.info("job_folder_cleaned", job=folder.tuning_job, removed=len(doomed), kept=len(found) - len(doomed))


def checked_prefix(folder: node_service_pb2.JobFolder) -> str:
    """The folder's prefix when it is that of its job: nothing else is ever deleted."""
    parts = parse_name(tuning_job_pb2.TuningJob, folder.tuning_job, "tuning_job")
    prefix = f"jobs/{parts['project']}/{parts['tuning_job']}/"
    if folder.key_prefix != prefix:
        raise InvalidArgument("INVALID_FIELD", f"{folder.key_prefix} is not the folder of {folder.tuning_job}")
    return prefix


def kept_keys(folder: node_service_pb2.JobFolder) -> set[str]:
    kept = {
        key_of(checkpoint.key, file)
        for checkpoint in folder.checkpoints
        for file in digests_from_proto(checkpoint)
        if is_start_weight(file.path)
    }
    return kept | {key_of(folder.model.key, file) for file in digests_from_proto(folder.model)}
