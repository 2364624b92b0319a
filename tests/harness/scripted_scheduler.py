"""A scheduler that does what a test tells it: a real mTLS server of NodeService that hands out leases
and keeps all reports.

It has no policy and no database; it fences by a set of live tokens, and a test can stop and start it on the same port.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from chassis.errors import Aborted, InvalidArgument, Unavailable
from chassis.process import Process
from chassis.rpc.server import ServerBuilder
from chassis.settings import ChassisSettings
from finemesh.nodes.v1 import node_pb2, node_service_pb2, node_service_pb2_grpc
from services.scheduler.config import SchedulerSettings

SERVICE = "finemesh.nodes.v1.NodeService"
# For what always comes; a machine whose cores others want takes several times as long.
WAIT_S_MAX = 90.0


class ScriptedScheduler(node_service_pb2_grpc.NodeServiceServicer):
    """`reports` holds every accepted report in order,
    as ("start" | "progress" | "commit" | "secrets" | "finish", request)."""

    def __init__(self) -> None:
        self.assignments: dict[int, node_pb2.Assignment] = {}
        self.stale: set[int] = set()
        self.reports: list[tuple[str, Any]] = []
        self.refused: list[tuple[str, Any]] = []
        self.registrations: list[node_service_pb2.RegisterNodeRequest] = []
        self.heartbeats: list[node_service_pb2.HeartbeatRequest] = []
        self.obsolete: list[Any] = []
        # By job, what its integrations are opened with.
        self.secrets: dict[str, Any] = {}
        self.failures: dict[str, int] = {}
        # As the real one does, it refuses a report of more.
        self.report_entries_max = SchedulerSettings().report_entries_max
        self.heartbeat_error: Exception | None = None
        # An ending is accepted at once; its answer takes this long.
        self.finish_answer_s = 0.0
        # Called with the kind of each report before it is judged.
        self.before: Callable[[str], None] = lambda kind: None
        self._changed = asyncio.Condition()
        self._pushed = asyncio.Event()

    async def assign(self, assignment: node_pb2.Assignment) -> None:
        self.assignments[assignment.lease.token] = assignment
        self._pushed.set()

    async def cancel(self, token: int) -> None:
        self.assignments[token].desired_state = node_pb2.DESIRED_STATE_CANCEL
        self._pushed.set()

    async def withdraw(self, token: int) -> None:
        del self.assignments[token]
        self.stale.add(token)
        self._pushed.set()

    async def wait_until(self, condition: Callable[[], bool], timeout_s: float = WAIT_S_MAX) -> None:
        async with asyncio.timeout(timeout_s), self._changed:
            await self._changed.wait_for(condition)

    async def wait_for(self, kind: str, count: int = 1, timeout_s: float = WAIT_S_MAX) -> Any:
        """The `count`th accepted report of a kind."""
        await self.wait_until(lambda: len(self.of(kind)) >= count, timeout_s)
        return self.of(kind)[count - 1]

    def of(self, kind: str) -> list[Any]:
        return [request for found, request in self.reports if found == kind]

    @property
    def usage(self) -> list[tuple[str, int, int, int]]:
        return [
            (entry.kind, entry.start_step, entry.end_step, entry.tokens)
            for request in self.of("progress")
            for entry in request.usage
        ]

    @property
    def steps(self) -> list[int]:
        return [item.step for request in self.of("progress") for item in request.metrics]

    async def RegisterNode(self, request: Any, context: Any) -> Any:
        self.registrations.append(request)
        await self._tell()
        answer = node_service_pb2.RegisterNodeResponse()
        answer.heartbeat_interval.FromMilliseconds(50)
        answer.lease_duration.FromMilliseconds(2000)
        return answer

    async def Heartbeat(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        async for request in requests:
            if self.heartbeat_error is not None:
                raise self.heartbeat_error
            self.heartbeats.append(request)
            await self._tell()
            yield node_service_pb2.HeartbeatResponse(assignments=list(self.assignments.values()))

    async def ClaimJobFolders(self, request: Any, context: object) -> Any:
        """No job has ended."""
        return node_service_pb2.ClaimJobFoldersResponse()

    async def StartAttempt(self, request: Any, context: Any) -> Any:
        await self._accept("start", request)
        return node_service_pb2.StartAttemptResponse()

    async def ReportProgress(self, request: Any, context: Any) -> Any:
        if len(request.metrics) + len(request.usage) + len(request.warnings) > self.report_entries_max:
            raise InvalidArgument("INVALID_FIELD", "too much in one report")
        await self._accept("progress", request)
        return node_service_pb2.ReportProgressResponse()

    async def CommitCheckpoint(self, request: Any, context: Any) -> Any:
        await self._accept("commit", request)
        obsolete, self.obsolete = self.obsolete, []
        return node_service_pb2.CommitCheckpointResponse(obsolete=obsolete)

    async def FetchJobSecrets(self, request: Any, context: Any) -> Any:
        await self._accept("secrets", request)
        return node_service_pb2.FetchJobSecretsResponse(secrets=self.secrets.get(request.tuning_job))

    async def FinishAttempt(self, request: Any, context: Any) -> Any:
        await self._accept("finish", request)
        self.assignments.pop(request.lease_token, None)
        await asyncio.sleep(self.finish_answer_s)
        return node_service_pb2.FinishAttemptResponse()

    async def _accept(self, kind: str, request: Any) -> None:
        self.before(kind)
        if self.failures.get(kind, 0) > 0:
            self.failures[kind] -= 1
            raise Unavailable("DEPENDENCY_UNAVAILABLE", "as scripted")
        if request.lease_token in self.stale:
            self.refused.append((kind, request))
            await self._tell()
            raise Aborted("LEASE_STALE", "this lease is over")
        self.reports.append((kind, request))
        await self._tell()

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()


class SchedulerServer:
    """The scheduler's process life in the test's loop: `start` and `stop` any number of times on one port."""

    def __init__(self, scheduler: ScriptedScheduler, settings: ChassisSettings) -> None:
        self._scheduler = scheduler
        self._settings = settings
        self._process: Process | None = None
        self._life: asyncio.Task[None] | None = None
        self.port = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        process = Process(self._settings)
        started = asyncio.Event()

        async def main(process: Process) -> None:
            builder = ServerBuilder(process, self._settings, listen_address=f"127.0.0.1:{self.port}")
            register = node_service_pb2_grpc.add_NodeServiceServicer_to_server
            builder.add(register, self._scheduler, SERVICE, {"trainer"}, endless={"Heartbeat"})
            self.port = await builder.start()
            started.set()

        self._process, self._life = process, asyncio.create_task(process.live(main))
        async with asyncio.timeout(WAIT_S_MAX):
            await started.wait()

    async def stop(self) -> None:
        assert self._process is not None
        assert self._life is not None
        self._process.stop()
        await self._life
        assert self._process.failure is None
