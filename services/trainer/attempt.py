"""One attempt from its assignment to its ending: fetch the inputs, run the child, hand on what it tells, clean up.

It decides nothing about the job: the child says what happened, the scheduler says what is wanted.
"""

import asyncio
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from chassis.clock import Clock
from chassis.errors import DomainError, InvalidArgument
from finemesh.nodes.v1 import node_pb2, node_service_pb2, node_service_pb2_grpc
from services.trainer import event_map, inputs, workdir
from services.trainer.cache import FileCache
from services.trainer.child import Child, ChildProtocolError
from services.trainer.config import TrainerSettings
from services.trainer.devices import LocalDevice
from services.trainer.event_map import Event, ProgressReport, RunView
from services.trainer.outside.outside import Outside
from services.trainer.outside.pulling import Pulled
from services.trainer.reports import Ending, LeaseLostError, Reporter, ReportRefusedError
from services.trainer.spec_map import job_id_of, kind_of
from services.trainer.transfer import ArtifactStore, revision_of
from services.trainer.uploads import CheckpointUploads, artifact_of
from services.trainer.warm import WarmChildren
from services.trainer.workdir import NodeFolder

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class Kit:
    """What every attempt of this agent works with."""

    settings: TrainerSettings
    stub: "node_service_pb2_grpc.NodeServiceAsyncStub"
    store: ArtifactStore
    cache: FileCache
    node_folder: NodeFolder
    devices: Mapping[int, LocalDevice]
    warm: WarmChildren
    clock: Clock


class _Ended(Exception):
    """The attempt is over before its child said so."""

    def __init__(self, ending: Ending) -> None:
        super().__init__(type(ending).__name__)
        self.ending = ending


class Attempt:
    """`run` is a task of its own. Cancelling that task kills the child and reports nothing; `cancel` and `release`
    end the attempt with a report."""

    # Whether this node tells what becomes of the run. In a gang one does.
    _speaks = True

    def __init__(self, assignment: node_pb2.Assignment, kit: Kit) -> None:
        self.token: int = assignment.lease.token
        self.job_id = job_id_of(assignment.lease.tuning_job)
        self._assignment = assignment
        self._kit = kit
        self._log = log.bind(job=self.job_id, lease_token=self.token)
        self._reporter = Reporter(kit.stub, assignment.lease, kit.settings, kit.clock)
        self._view = RunView(assignment.resume_from.step)
        self._child: Child | None = None
        self._cancelled = False
        self._interrupted: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        self._grace: asyncio.Task[None] | None = None
        self._exported: Event | None = None
        self._last_event: Event | None = None
        self._partial: Event | None = None
        self._outside: Outside | None = None
        self._pulled: Pulled | None = None

    @property
    def is_ending(self) -> bool:
        """True once it tells the scheduler how it ended: its child is dead, and what it still does is to clean up."""
        return self._reporter.is_ending

    async def run(self) -> None:
        """Raises nothing but CancelledError; whatever happens, no child and no file of it is left."""
        folder = await asyncio.to_thread(self._kit.node_folder.create, self.job_id, str(self.token))
        uploads = CheckpointUploads(
            self._kit.store,
            self._reporter,
            staging=folder / "staging",
            key_prefix=self._assignment.checkpoint_key_prefix,
            lease_token=self.token,
        )
        self._outside = outside = Outside(
            self._assignment, self._kit.stub, self._kit.settings, self._kit.clock, folder=folder, warn=self._warn
        )
        if self._speaks:
            outside.open()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._reporter.run())
                group.create_task(self._work(folder, uploads))
            if not self._interrupted.done():
                await outside.close()
        except* LeaseLostError as lost:
            self._log.warning("lease lost", detail=str(lost.exceptions[0]))
        except* ReportRefusedError as refused:
            self._log.error("report refused", detail=str(refused.exceptions[0]))
        finally:
            if self._grace is not None:
                self._grace.cancel()
            await outside.abandon()
            await asyncio.to_thread(workdir.remove, folder)
            await self._discard(uploads)

    def cancel(self) -> None:
        """The scheduler wants the job to end: after the current step, or at once when nothing runs yet."""
        if self._cancelled:
            return
        self._cancelled = True
        self._log.info("cancelling")
        if self._child is None:
            self._interrupt(node_service_pb2.AttemptStopped(step=self._assignment.resume_from.step))
            return
        self._child.ask_to_stop()
        self._grace = asyncio.create_task(self._kill_after_grace(self._child))

    def release(self) -> None:
        """The node goes away: the child dies at once, and the job may go on elsewhere from its last checkpoint."""
        if self._cancelled:
            self._interrupt(node_service_pb2.AttemptStopped(step=self._view.step))
        else:
            self._interrupt(event_map.failed_platform("the node was shut down", drained="true"))

    def _interrupt(self, ending: Ending) -> None:
        if not self._interrupted.done():
            self._interrupted.set_result(ending)

    async def _work(self, folder: Path, uploads: CheckpointUploads) -> None:
        training = asyncio.create_task(self._ending(folder, uploads))
        try:
            await asyncio.wait({training, self._interrupted}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not training.done():
                training.cancel()
                await asyncio.wait({training})
        ending = self._interrupted.result() if training.cancelled() else training.result()
        self._log.info("attempt ends", ending=type(ending).__name__, step=self._view.step)
        await self._reporter.finished(ending)

    async def _ending(self, folder: Path, uploads: CheckpointUploads) -> Ending:
        """Every way in which an attempt can end by itself, as a report."""
        try:
            return await self._train(folder, uploads)
        except _Ended as ended:
            return ended.ending
        except ChildProtocolError as error:
            return event_map.failed_platform(str(error))
        except DomainError as error:
            return event_map.failed_by_error(error)
        except Exception as error:
            self._log.exception("attempt failed unexpectedly")
            full = event_map.failed_by_disk(error) if isinstance(error, OSError) else None
            return full or event_map.failed_platform("the node failed unexpectedly; its log has the details")

    async def _train(self, folder: Path, uploads: CheckpointUploads) -> Ending:
        devices = await self._prepare(folder)
        child = await self._start_child(folder, devices)
        try:
            if self._speaks:
                await self._reporter.started(self._pulled.commit if self._pulled else "")
            await _together(self._hear(child, folder, uploads), uploads)
            exit_code = await child.wait()
        finally:
            child.kill()
            await child.wait()
        return await self._ending_of(child, exit_code, folder)

    async def _prepare(self, folder: Path) -> list[LocalDevice]:
        kit, assignment = self._kit, self._assignment
        wanted = sorted(set(assignment.device_indices))
        devices = [kit.devices[index] for index in wanted if index in kit.devices]
        if not devices or len(devices) < len(wanted):
            raise InvalidArgument("INVALID_FIELD", f"no device {list(assignment.device_indices)} on this node")
        fetched = await inputs.fetch_inputs(assignment, folder, cache=kit.cache, store=kit.store)
        try:
            self._pulled = await self._pull(folder)
            inputs.write_spec(assignment, folder, fetched, devices, kit.settings, self._pulled)
        except InvalidArgument as error:
            raise _Ended(event_map.failed_by_error(error, user_fault=True)) from error
        return devices

    async def _pull(self, folder: Path) -> Pulled | None:
        start = self._assignment.start_from
        if not start.HasField("hub"):
            return None
        assert self._outside is not None
        bytes_max = inputs.start_bytes_max(self._assignment.base_model)
        return await self._outside.pull(start.hub, folder / inputs.START, bytes_max)

    async def _start_child(self, folder: Path, devices: list[LocalDevice]) -> Child:
        # A waiting child sees one device; over several it would only load more before it starts its workers.
        alone = len(devices) == 1 and not self._assignment.HasField("gang")
        waiting = await self._kit.warm.take(devices[0].index, folder, self.job_id) if alone else None
        self._child = waiting or await self._new_child(folder, devices)
        self._log.info("child started", child=self._child.pid, warm=waiting is not None)
        return self._child

    async def _new_child(self, folder: Path, devices: list[LocalDevice]) -> Child:
        settings = self._kit.settings
        starting = asyncio.ensure_future(
            Child.start(
                settings.child_module,
                folder,
                job_id=self.job_id,
                threads=settings.threads_per_child,
                gpu_uuid=",".join(device.uuid for device in devices if device.uuid),
                line_bytes_max=settings.child_line_bytes_max,
            )
        )
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            # A process that is being born cannot be cancelled, only killed.
            child = await starting
            child.kill()
            await child.wait()
            raise

    async def _hear(self, child: Child, folder: Path, uploads: CheckpointUploads) -> None:
        events = aiter(child.events())
        silence_s_max = self._kit.settings.child_silence_s_max if self._speaks else None
        while True:
            try:
                async with asyncio.timeout(silence_s_max):
                    event = await anext(events, None)
            except TimeoutError:
                raise _Ended(event_map.failed_platform("the training process hung")) from None
            if event is None:
                return
            try:
                await self._on_event(event, folder, uploads)
            except (KeyError, TypeError, ValueError) as error:
                raise ChildProtocolError(f"the child's {event['type']} event is malformed: {error!r}") from error

    async def _on_event(self, event: Event, folder: Path, uploads: CheckpointUploads) -> None:
        kind = event["type"]
        if kind == "started":
            self._on_started(event)
        elif kind == "preparing":
            self._log.info("preparing", **{name: value for name, value in event.items() if name != "type"})
        elif kind == "progress" and event.get("partial"):
            # Owed only when the job ends here; otherwise these steps are done again, in their planned range.
            self._partial = event
        elif kind == "progress":
            await self._progress(self._view.progress(event))
        elif kind == "evaluation":
            await self._progress(self._view.evaluation(event))
        elif kind == "warning":
            await self._reporter.progress(self._view.warning(event))
        elif kind == "checkpoint":
            await uploads.offer(event, _inside(folder, event["path"]))
        elif kind == "exported":
            self._exported = event
        elif kind in ("finished", "stopped", "failed"):
            self._last_event = event

    async def _progress(self, report: ProgressReport) -> None:
        if self._outside is not None:
            self._outside.tell(report)
        await self._reporter.progress(report)

    async def _warn(self, code: str, message: str) -> None:
        """Something that the user should know; once the ending is told, only the log still hears it."""
        self._log.warning(message, code=code)
        if not self._reporter.is_ending:
            await self._reporter.progress(self._view.warning({"code": code, "message": message}))

    def _on_started(self, event: Event) -> None:
        self._view.started(event)
        wrong = event_map.mismatch(event, self._assignment.counts)
        if wrong is not None:
            raise _Ended(event_map.failed_platform(f"{wrong}; it was priced by other counts", retryable=False))

    async def _ending_of(self, child: Child, exit_code: int, folder: Path) -> Ending:
        last = self._last_event
        kind = last["type"] if last is not None else None
        is_final = (kind == "stopped" and self._cancelled) or (
            kind == "failed" and last is not None and last["kind"] == "user"
        )
        if self._partial is not None and is_final:
            await self._progress(self._view.progress(self._partial))
        if last is not None and kind == "finished":
            return await self._succeeded(last, folder)
        if last is not None and kind == "failed":
            return event_map.failed_by_child(last)
        if self._cancelled:
            step = int(last["step"]) if last is not None else self._view.step
            return node_service_pb2.AttemptStopped(step=step)
        if kind == "stopped":
            return event_map.failed_platform("the training process was stopped from outside")
        return event_map.failed_without_a_word(exit_code, child.last_words)

    async def _succeeded(self, finished: Event, folder: Path) -> Ending:
        exported = self._exported
        if exported is None:
            raise ChildProtocolError("the child finished without an export")
        files, revision = event_map.files_of(exported), str(exported["revision"])
        if revision_of(files) != revision:
            return event_map.failed_platform("the export's revision does not match its files")
        key = f"{self._assignment.model_key_prefix}{revision}/"
        export = _inside(folder, exported["path"])
        await self._kit.store.upload_all(export, key, files)
        # The model is safe; what fails from here on is no failure of the job.
        pushed = {} if self._outside is None or self._cancelled else await self._outside.push(export, files, revision)
        kind = kind_of(self._assignment.spec)
        return node_service_pb2.AttemptSucceeded(
            model=artifact_of(key, files),
            revision=revision,
            kind=kind,
            adapter_rank=self._assignment.spec.lora.rank if kind == "adapter" else 0,
            lineage=event_map.lineage_of(exported) | pushed,
            step=int(finished.get("step") or finished["total_steps"]),
            stopped_early=bool(finished.get("stopped_early")),
        )

    async def _kill_after_grace(self, child: Child) -> None:
        await self._kit.clock.sleep(self._kit.settings.cancel_grace_s)
        self._log.warning("the child did not stop in time and is killed")
        child.kill()

    async def _discard(self, uploads: CheckpointUploads) -> None:
        try:
            await uploads.discard_uncommitted()
        except DomainError as error:
            self._log.warning("uncommitted files stay in the store", error=str(error))


async def _together(hearing: Coroutine[Any, Any, None], uploads: CheckpointUploads) -> None:
    """Hears the child to its end and stores its checkpoints meanwhile; the first error ends both and passes as it is."""

    async def hear_all() -> None:
        await hearing
        uploads.close()

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(uploads.run())
            group.create_task(hear_all())
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from errors


def _inside(folder: Path, path: str) -> Path:
    """A folder that the child named, which must be one of its own."""
    named = (folder / path).resolve()
    if not named.is_relative_to(folder.resolve()):
        raise ChildProtocolError("the child named a folder outside of its work folder")
    return named
