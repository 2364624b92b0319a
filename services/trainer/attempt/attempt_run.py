"""Runs one attempt, from its assignment to its ending. Not pure: processes, files.

It fetches the inputs, runs the child, reports and cleans up. It decides nothing about the job: the child tells what
happened, the scheduler tells what is wanted. What a leading and a following node do differently is in their roles.
"""

import asyncio
from pathlib import Path

import structlog

from chassis.errors import DomainError, InvalidArgument
from finemesh.nodes.v1 import node_pb2, node_service_pb2
from services.trainer.attempt import convert
from services.trainer.attempt.follower import Follower
from services.trainer.attempt.kit import Kit
from services.trainer.attempt.leader import Leader
from services.trainer.attempt.reporter import AttemptOver, Ending, LeaseLostError, Reporter, ReportRefusedError
from services.trainer.attempt.role import Role
from services.trainer.child.training_child import Child, ChildProtocolError, ChildStuckError
from services.trainer.inputs.attempt_keys import check_assignment
from services.trainer.inputs.convert import job_id_of
from services.trainer.inputs.fetch import fetch_hub_start, fetch_inputs
from services.trainer.inputs.spec_file import write_spec
from services.trainer.integrations.fetched_secrets import FetchedSecrets
from services.trainer.node import work_folders
from services.trainer.node.devices import LocalDevice

log = structlog.get_logger()


class Attempt:
    """`run` is a task of its own. Cancelling that task kills the child and reports nothing.

    `cancel` and `release` end the attempt with a report.
    """

    def __init__(self, assignment: node_pb2.Assignment, kit: Kit) -> None:
        self.token: int = assignment.lease.token
        self.job_id = job_id_of(assignment.lease.tuning_job)
        self._assignment = assignment
        self._kit = kit
        self._log = log.bind(job=self.job_id, lease_token=self.token)
        self._reporter = Reporter(kit.stub, assignment.lease, kit.settings, kit.clock)
        self._secrets = FetchedSecrets(assignment.lease, kit.stub, kit.settings, kit.clock)
        self._role = _role_for(assignment, kit, self._reporter, self._secrets)
        self._child: Child | None = None
        # Why the devices are not free when the attempt is over; empty when they are.
        self.stuck = ""
        self._interrupted: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()

    @property
    def is_ending(self) -> bool:
        """True once it reports its ending: its child is dead, and only the clean-up is left."""
        return self._reporter.is_ending

    async def run(self) -> None:
        """Raises nothing but CancelledError; whatever happens, no child and no file of it is left."""
        folder = await asyncio.to_thread(self._kit.node_folder.create, self.job_id, str(self.token))
        self._role.open(folder)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._reporter.run())
                group.create_task(self._work(folder))
            if not self._interrupted.done():
                await self._role.close()
        except* LeaseLostError as lost:
            self._log.warning("lease_lost", detail=str(lost.exceptions[0]))
        except* ReportRefusedError as refused:
            self._log.error("report_refused", detail=str(refused.exceptions[0]))
        finally:
            await self._role.abandon()
            await self._secrets.abandon()
            await asyncio.to_thread(work_folders.remove, folder)
            await self._role.discard_uncommitted()

    def cancel(self) -> None:
        """The scheduler wants the job to end: after the current step, or at once when nothing runs yet."""
        if not self._role.is_cancelled:
            ending = self._role.cancel(self._child)
            if ending is not None and not self._interrupted.done():
                self._interrupted.set_result(ending)

    def release(self) -> None:
        """The node goes away: the child dies at once, and the job may go on elsewhere from its last checkpoint."""
        if self._interrupted.done():
            return
        try:
            self._interrupted.set_result(self._role.ending_when_released())
        except LeaseLostError as lost:
            self._interrupted.set_exception(lost)

    async def _work(self, folder: Path) -> None:
        """Trains until the run ends or is interrupted, then reports the ending."""
        training = asyncio.create_task(self._ending(folder))
        try:
            await asyncio.wait({training, self._interrupted}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not training.done():
                training.cancel()
                await asyncio.wait({training})
        ending = self._interrupted.result() if training.cancelled() else training.result()
        if isinstance(ending, node_service_pb2.AttemptFailed) and self._assignment.HasField("resume_from"):
            convert.name_bad_checkpoint(ending, self._assignment.resume_from)
        self._log.info("attempt_ends", ending=type(ending).__name__)
        await self._reporter.finished(ending)

    async def _ending(self, folder: Path) -> Ending:
        """Every way in which an attempt can end by itself, as a report."""
        try:
            return await self._train(folder)
        except AttemptOver as over:
            return over.ending
        except ChildStuckError as error:
            self._log.error("child_stuck", detail=str(error))
            self.stuck = str(error)
            return convert.platform_fault_to_proto(str(error), cause="child_stuck")
        except ChildProtocolError as error:
            return convert.platform_fault_to_proto(str(error))
        except DomainError as error:
            return convert.error_to_proto(error)
        except Exception as error:
            self._log.exception("attempt_failed")
            full = convert.disk_error_to_proto(error) if isinstance(error, OSError) else None
            return full or convert.platform_fault_to_proto("the node failed unexpectedly; its log has the details")

    async def _train(self, folder: Path) -> Ending:
        devices, hub_commit = await self._prepare(folder)
        child = await self._start_child(folder, devices)
        try:
            await self._role.hear(child, hub_commit)
            exit_code = await child.wait()
        finally:
            child.kill()
            await child.wait()
        return await self._role.ending(child, exit_code)

    async def _prepare(self, folder: Path) -> tuple[list[LocalDevice], str]:
        """Puts all that the child needs into `folder`. The devices, and the hub's commit that the run starts from."""
        kit, assignment = self._kit, self._assignment
        check_assignment(assignment)
        wanted = sorted(set(assignment.device_indices))
        devices = [kit.devices[index] for index in wanted if index in kit.devices]
        if not devices or len(devices) < len(wanted):
            raise InvalidArgument("INVALID_FIELD", f"no device {list(assignment.device_indices)} on this node")
        fetched = await fetch_inputs(assignment, folder, cache=kit.cache, store=kit.store)
        try:
            pulled = await fetch_hub_start(assignment, folder, self._secrets, kit.settings, kit.clock)
            write_spec(assignment, folder, fetched, devices, kit.settings, pulled)
        except InvalidArgument as error:
            raise AttemptOver(convert.error_to_proto(error, user_fault=True)) from error
        return devices, pulled.commit if pulled else ""

    async def _start_child(self, folder: Path, devices: list[LocalDevice]) -> Child:
        # A warm child sees one device; over several it would only load more before it starts its workers.
        alone = len(devices) == 1 and not self._assignment.HasField("gang")
        warm = await self._kit.warm.take(devices[0].index, folder, self.job_id) if alone else None
        settings = self._kit.settings
        self._child = warm or await Child.start(
            settings.child_module,
            folder,
            job_id=self.job_id,
            threads=settings.threads_per_child,
            gpu_uuid=",".join(device.uuid for device in devices if device.uuid),
            line_bytes_max=settings.child_line_bytes_max,
            ending_s_max=settings.child_ending_s_max,
        )
        self._log.info("child_started", child=self._child.pid, warm=warm is not None)
        return self._child


def _role_for(assignment: node_pb2.Assignment, kit: Kit, reporter: Reporter, secrets: FetchedSecrets) -> Role:
    if assignment.HasField("gang") and not assignment.gang.leads:
        return Follower()
    return Leader(assignment, kit, reporter, secrets)
