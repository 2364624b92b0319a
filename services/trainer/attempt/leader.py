"""The role of a node that leads a run: it reports all that its child tells. Not pure: protobuf, the artifact store.

It also stores the checkpoints and the model. It knows nothing of the other nodes of a gang.
"""

import asyncio
from pathlib import Path

import structlog

from chassis.errors import DomainError
from finemesh.nodes.v1 import node_pb2, node_service_pb2
from services.trainer.attempt import convert, leader_ending
from services.trainer.attempt.checkpoint_uploads import CheckpointUploads
from services.trainer.attempt.child_events import ChildEvents, hear
from services.trainer.attempt.kit import Kit
from services.trainer.attempt.reporter import Ending, Reporter
from services.trainer.attempt.run_view import RunView
from services.trainer.child.training_child import Child
from services.trainer.inputs.convert import job_id_of
from services.trainer.integrations.fetched_secrets import FetchedSecrets
from services.trainer.integrations.job_integrations import JobIntegrations

log = structlog.get_logger()


class Leader:
    # Set by `open`, which comes before everything that uses them.
    _folder: Path
    _uploads: CheckpointUploads
    _integrations: JobIntegrations
    _events: ChildEvents

    def __init__(self, assignment: node_pb2.Assignment, kit: Kit, reporter: Reporter, secrets: FetchedSecrets) -> None:
        self._assignment = assignment
        self._kit = kit
        self._reporter = reporter
        self._secrets = secrets
        self._job_id = job_id_of(assignment.lease.tuning_job)
        self._log = log.bind(job=self._job_id, lease_token=assignment.lease.token)
        self._view = RunView(assignment.resume_from.step)
        self._killing: asyncio.Task[None] | None = None
        self._is_cancelled = False

    @property
    def is_cancelled(self) -> bool:
        return self._is_cancelled

    def open(self, folder: Path) -> None:
        kit, assignment = self._kit, self._assignment
        self._folder = folder
        self._uploads = CheckpointUploads(
            kit.store,
            self._reporter,
            staging=folder / "staging",
            key_prefix=assignment.checkpoint_key_prefix,
            lease_token=assignment.lease.token,
        )
        self._integrations = JobIntegrations(
            assignment.spec,
            self._secrets,
            kit.settings,
            kit.clock,
            job_id=self._job_id,
            folder=folder,
            warn=self._warn,
        )
        self._events = ChildEvents(
            assignment.counts, folder, self._view, self._reporter, self._uploads, self._integrations
        )
        self._integrations.open()

    async def hear(self, child: Child, hub_commit: str) -> None:
        """Stores checkpoints meanwhile. The first error ends both and passes as it is."""
        await self._reporter.started(hub_commit)

        async def hear_all() -> None:
            await hear(child, self._events.on_event, silence_s_max=self._kit.settings.child_silence_s_max)
            self._uploads.close()

        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._uploads.run())
                group.create_task(hear_all())
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from errors

    async def ending(self, child: Child, exit_code: int) -> Ending:
        last, partial = self._events.last, self._events.partial
        if partial is not None and leader_ending.is_final(last, is_cancelled=self._is_cancelled):
            await self._events.report(self._view.progress(partial))
        if last is None or last["type"] != "finished":
            return leader_ending.unfinished(
                last,
                step=self._view.step,
                exit_code=exit_code,
                last_words=child.last_words,
                is_cancelled=self._is_cancelled,
            )
        model = await leader_ending.upload_model(self._events.exported, self._assignment, self._folder, self._kit.store)
        # The model is safe; what fails from here on is no failure of the job.
        pushed: dict[str, str] = {}
        if not self._is_cancelled:
            names = [file.path for file in model.files]
            pushed = await self._integrations.push(model.folder, names, model.revision)
        return leader_ending.succeeded(last, model, self._assignment.spec, pushed)

    def cancel(self, child: Child | None) -> Ending | None:
        """After the current step, or at once when nothing runs yet."""
        self._is_cancelled = True
        self._log.info("cancelling")
        if child is None:
            return node_service_pb2.AttemptStopped(step=self._assignment.resume_from.step)
        child.ask_to_stop()
        self._killing = asyncio.create_task(self._kill_after_grace(child))
        return None

    def ending_when_released(self) -> Ending:
        if self._is_cancelled:
            return node_service_pb2.AttemptStopped(step=self._view.step)
        return convert.platform_fault_to_proto("the node was shut down", drained="true")

    async def close(self) -> None:
        await self._integrations.close()

    async def abandon(self) -> None:
        if self._killing is not None:
            self._killing.cancel()
        await self._integrations.abandon()

    async def discard_uncommitted(self) -> None:
        try:
            await self._uploads.discard_uncommitted()
        except DomainError as error:
            self._log.warning("uncommitted_files_left", error=str(error))

    async def _kill_after_grace(self, child: Child) -> None:
        await self._kit.clock.sleep(self._kit.settings.cancel_grace_s)
        self._log.warning("child_killed", detail="it did not stop in time")
        child.kill()

    async def _warn(self, code: str, message: str) -> None:
        """Something that the user should know. Once the ending is reported, it only goes to the log."""
        self._log.warning("integration_failed", code=code, detail=message)
        if not self._reporter.is_ending:
            await self._reporter.progress(self._view.warning({"code": code, "message": message}))
