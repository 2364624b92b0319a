"""A scripted agent: registers a node, keeps its heartbeat, and reports what a test tells it to."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any

from chassis.rpc.channel import NO_DEADLINE, open_channel
from chassis.settings import ChassisSettings
from finemesh.artifacts.v1 import artifact_pb2
from finemesh.nodes.v1 import node_pb2, node_service_pb2, node_service_pb2_grpc
from finemesh.tuning.v1 import tuning_job_pb2

WAIT_S_MAX = 60.0
NODE = "n1"


class Agent:
    """`working` False: it lives, but renews no lease. Leaving the context ends the heartbeat as a crash does."""

    def __init__(
        self,
        settings: ChassisSettings,
        target: str,
        datasets_address: str,
        *,
        node: str = NODE,
        incarnation: str = "",
        devices: int = 1,
        interval_s: float = 0.1,
        preparation_version: str = "",
    ) -> None:
        self._channel = open_channel(settings, target, "scheduler")
        self.stub = node_service_pb2_grpc.NodeServiceStub(self._channel)
        self._address = datasets_address
        self.node = node
        # Each start of an agent is its own, unless a test says otherwise.
        self.incarnation = incarnation or uuid.uuid4().hex
        self._devices = devices
        self._interval_s = interval_s
        self._preparation_version = preparation_version
        self.working = True
        self.assignments: dict[int, node_pb2.Assignment] = {}
        self._changed = asyncio.Event()
        self._listened_to = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Agent":
        await self.register()
        self._task = asyncio.create_task(self._heartbeat())
        # A node is given nothing before the scheduler listens to it; a heartbeat that is refused is the test's matter.
        listened_to = asyncio.create_task(self._listened_to.wait())
        async with asyncio.timeout(WAIT_S_MAX):
            await asyncio.wait((self._task, listened_to), return_when=asyncio.FIRST_COMPLETED)
        listened_to.cancel()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.crash()
        await self._channel.close()

    async def register(self) -> node_service_pb2.RegisterNodeResponse:
        devices = [node_pb2.Device(index=index, hardware_type="cpu") for index in range(self._devices)]
        return await self.stub.RegisterNode(
            node_service_pb2.RegisterNodeRequest(
                node=self.node,
                incarnation=self.incarnation,
                address=self._address,
                devices=devices,
                preparation_version=self._preparation_version,
            )
        )

    async def crash(self) -> None:
        """No more signs of life."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def heartbeat_error(self) -> BaseException | None:
        """What ended the heartbeat."""
        assert self._task is not None
        (outcome,) = await asyncio.wait_for(asyncio.gather(self._task, return_exceptions=True), WAIT_S_MAX)
        return outcome

    async def assignment(
        self, *, cancelled: bool = False, after: node_pb2.Assignment | None = None
    ) -> node_pb2.Assignment:
        """The one assignment, once it is wanted in this way; the next one `after` that of an attempt that is over,
        which stays known until the next heartbeat is answered."""
        wanted = node_pb2.DESIRED_STATE_CANCEL if cancelled else node_pb2.DESIRED_STATE_RUN
        over = 0 if after is None else after.lease.token
        return await self._until(
            lambda: next(
                (each for token, each in self.assignments.items() if token > over and each.desired_state == wanted),
                None,
            )
        )

    async def idle(self) -> None:
        await self._until(lambda: True if not self.assignments else None)

    async def start(self, assignment: node_pb2.Assignment, hub_commit: str = "") -> None:
        await self.stub.StartAttempt(
            node_service_pb2.StartAttemptRequest(
                lease_token=assignment.lease.token,
                tuning_job=assignment.lease.tuning_job,
                hub_commit=hub_commit,
            )
        )

    async def progress(self, assignment: node_pb2.Assignment, start: int, end: int, tokens: int = 100) -> None:
        await self.stub.ReportProgress(
            node_service_pb2.ReportProgressRequest(
                lease_token=assignment.lease.token,
                tuning_job=assignment.lease.tuning_job,
                metrics=[
                    tuning_job_pb2.TuningProgress(step=step, step_count=20, training_loss=3.0 / step)
                    for step in range(start + 1, end + 1)
                ],
                usage=[node_service_pb2.TrainingUsage(kind="train", start_step=start, end_step=end, tokens=tokens)],
            )
        )

    async def checkpoint(self, assignment: node_pb2.Assignment, step: int) -> node_service_pb2.CommitCheckpointResponse:
        key = f"{assignment.checkpoint_key_prefix}{step}-{assignment.lease.token}/"
        return await self.stub.CommitCheckpoint(
            node_service_pb2.CommitCheckpointRequest(
                lease_token=assignment.lease.token,
                tuning_job=assignment.lease.tuning_job,
                checkpoint=node_pb2.CheckpointManifest(
                    step=step, artifact=_artifact(key), manifest_sha256=f"sha-{step}"
                ),
            )
        )

    async def succeed(self, assignment: node_pb2.Assignment, revision: str = "rv_tuned") -> None:
        result = node_service_pb2.AttemptSucceeded(
            model=_artifact(f"{assignment.model_key_prefix}{revision}/"),
            revision=revision,
            kind="adapter",
            adapter_rank=16,
            step=20,
        )
        await self.finish(assignment, succeeded=result)

    async def fail(self, assignment: node_pb2.Assignment, error: tuning_job_pb2.JobError, *, retryable: bool) -> None:
        await self.finish(assignment, failed=node_service_pb2.AttemptFailed(error=error, retryable=retryable))

    async def stop(self, assignment: node_pb2.Assignment, step: int) -> None:
        await self.finish(assignment, stopped=node_service_pb2.AttemptStopped(step=step))

    async def finish(self, assignment: node_pb2.Assignment, **result: Any) -> None:
        await self.stub.FinishAttempt(
            node_service_pb2.FinishAttemptRequest(
                lease_token=assignment.lease.token, tuning_job=assignment.lease.tuning_job, **result
            )
        )

    async def _heartbeat(self) -> None:
        async for response in self.stub.Heartbeat(self._beats(), timeout=NO_DEADLINE):
            self.assignments = {each.lease.token: each for each in response.assignments}
            self._changed.set()
            self._listened_to.set()

    async def _beats(self) -> AsyncIterator[node_service_pb2.HeartbeatRequest]:
        while True:
            tokens = list(self.assignments) if self.working else []
            yield node_service_pb2.HeartbeatRequest(node=self.node, incarnation=self.incarnation, lease_tokens=tokens)
            # The pace of a heartbeat, not a wait for something.
            await asyncio.sleep(self._interval_s)

    async def _until(self, look):
        async with asyncio.timeout(WAIT_S_MAX):
            while (found := look()) is None:
                self._changed.clear()
                await self._changed.wait()
        return found


def _artifact(key: str) -> artifact_pb2.Artifact:
    return artifact_pb2.Artifact(key=key, files=[artifact_pb2.ArtifactFile(path="a", size_bytes=3, sha256="00")])
