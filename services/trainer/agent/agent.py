"""Keeps in touch with the scheduler: registers this node, sends heartbeats, passes on what they answer. Not pure: gRPC.

Every response holds all assignments, so that a lost one costs nothing. It decides no order and no placement.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import grpc
import structlog

from chassis.backoff import Backoff
from chassis.errors import DomainError, Unavailable
from chassis.rpc.channel import NO_DEADLINE
from finemesh.nodes.v1 import node_pb2, node_service_pb2
from services.trainer.agent.assignments import Assignments
from services.trainer.agent.scheduler_link import SchedulerLink
from services.trainer.attempt.kit import Kit
from services.trainer.train.data.preparation.fingerprint import preparation_version

if TYPE_CHECKING:
    _Stream = grpc.aio.StreamStreamCall[node_service_pb2.HeartbeatRequest, node_service_pb2.HeartbeatResponse]

log = structlog.get_logger()

VERSION = "0.1.0"
# Silence of this part of a lease ends a connection that only looks alive; the rest is for finding another replica.
SILENCE_SHARE = 1 / 3
# What a heartbeat or registration is answered with when a newer incarnation of this node exists.
_NAME_TAKEN = frozenset({"LEASE_STALE", "STATE_CONFLICT"})
# The certificate is another node's, or of none: a person has to give the right one.
_NOT_CERTIFIED = "NODE_NOT_CERTIFIED"
# After a failed write the reason arrives where we read, within this time.
_REASON_WAIT_S = 1.0


class Agent:
    """`run` until `stop_working`; then `release` waits for the last reports."""

    def __init__(
        self,
        kit: Kit,
        link: SchedulerLink,
        *,
        incarnation: str,
        address: str,
        on_registered: Callable[[], Awaitable[None]],
    ) -> None:
        self._kit = kit
        self._link = link
        # Until the scheduler says how long a lease lives.
        self._silence_s = kit.settings.connect_timeout_s
        self._on_registered = on_registered
        self._incarnation = incarnation
        self._address = address
        self._assignments = Assignments(kit)
        self._stopping = asyncio.Event()
        self._taken_leave = asyncio.Event()
        self._taken_leave.set()

    async def run(self) -> None:
        """Keeps in touch for ever; raises only when another agent took this node's name."""
        settings = self._kit.settings
        backoff = Backoff(first_s=settings.reconnect_backoff_s_min, last_s=settings.reconnect_backoff_s_max)
        while not self._stopping.is_set():
            try:
                await self._link.renew()
                interval_s = await self._register()
                await self._on_registered()
                backoff.reset()
                self._assignments.warm_free_devices()
                await self._keep_in_touch(interval_s)
            except DomainError as error:
                log.warning("scheduler_lost", error=str(error))
                if error.reason == _NOT_CERTIFIED:
                    log.error("node_not_certified", node=settings.node_name, detail=error.message)
                    self._assignments.abandon_all()
                    raise
                if error.reason in _NAME_TAKEN:
                    log.error(
                        "node_name_taken", node=settings.node_name, detail="another agent registered; this one stops"
                    )
                    self._assignments.abandon_all()
                    raise
            await self._kit.clock.sleep(backoff.next_s())

    async def stop_working(self) -> None:
        """No more heartbeats and no more work: every child dies now, its attempt still reports.

        The scheduler hears first that nobody listens here any more. Else the job that an attempt hands back would be
        placed on this node again at once.
        """
        self._stopping.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_REASON_WAIT_S):
                await self._taken_leave.wait()
        await self._assignments.stop()

    async def release(self) -> None:
        """Returns when every attempt has reported its ending; the leases of those that cannot just run out."""
        await self._assignments.finish()

    async def _register(self) -> float:
        """The interval between heartbeats, in seconds."""
        self._assignments.device_lost.clear()
        devices = [
            node_pb2.Device(
                index=device.index,
                hardware_type=device.hardware_type,
                memory_bytes=device.memory_bytes,
                uuid=device.uuid,
                set_aside_reason=self._assignments.set_aside.get(device.index, ""),
            )
            for device in self._kit.devices.values()
        ]
        answer = await self._kit.stub.RegisterNode(
            node_service_pb2.RegisterNodeRequest(
                node=self._kit.settings.node_name,
                incarnation=self._incarnation,
                address=self._address,
                devices=devices,
                agent_version=VERSION,
                preparation_version=preparation_version(),
            ),
            timeout=self._silence_s,
        )
        lease_s = answer.lease_duration.ToMilliseconds() / 1000
        self._silence_s = max(SILENCE_SHARE * lease_s, self._kit.settings.scheduler_silence_s_min)
        interval_s: float = answer.heartbeat_interval.ToMilliseconds() / 1000
        log.info("registered", node=self._kit.settings.node_name, heartbeat_interval_s=interval_s)
        return max(interval_s, 0.01)

    async def _keep_in_touch(self, interval_s: float) -> None:
        """Until the stream breaks (DomainError), a device is set aside or the agent stops."""
        stream = self._kit.stub.Heartbeat(timeout=NO_DEADLINE)
        hearing = asyncio.create_task(self._hear_responses(stream))
        sending = asyncio.create_task(self._send_heartbeats(stream, interval_s))
        losing = asyncio.create_task(self._assignments.device_lost.wait())
        self._taken_leave.clear()
        try:
            await asyncio.wait((hearing, sending, losing), return_when=asyncio.FIRST_COMPLETED)
            if not losing.done():
                await asyncio.wait((hearing,), timeout=_REASON_WAIT_S)
        finally:
            for task in (hearing, sending, losing):
                task.cancel()
            await asyncio.wait((hearing, sending, losing))
            stream.cancel()
            self._taken_leave.set()
        if self._stopping.is_set():
            return
        for task in (hearing, sending):
            error = None if task.cancelled() else task.exception()
            if error is not None:
                raise error

    async def _send_heartbeats(self, stream: "_Stream", interval_s: float) -> None:
        while not self._stopping.is_set():
            request = node_service_pb2.HeartbeatRequest(
                node=self._kit.settings.node_name,
                incarnation=self._incarnation,
                lease_tokens=self._assignments.lease_tokens,
            )
            try:
                await stream.write(request)
            except asyncio.InvalidStateError:
                raise Unavailable("DEPENDENCY_UNAVAILABLE", "the heartbeat stream is over") from None
            await self._sleep_unless_stopping(interval_s)
        # The scheduler ends its side when it has written down that nobody listens here.
        await stream.done_writing()

    async def _sleep_unless_stopping(self, seconds: float) -> None:
        sleep = asyncio.ensure_future(self._kit.clock.sleep(seconds))
        stop = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait((sleep, stop), return_when=asyncio.FIRST_COMPLETED)
        finally:
            sleep.cancel()
            stop.cancel()

    async def _hear_responses(self, stream: "_Stream") -> None:
        while True:
            try:
                # By the monotonic clock of the event loop: a wall clock that is set is no silence.
                async with asyncio.timeout(self._silence_s):
                    response = await stream.read()
            except TimeoutError:
                raise Unavailable("DEPENDENCY_UNAVAILABLE", "the scheduler does not answer heartbeats") from None
            if response is grpc.aio.EOF:
                raise Unavailable("DEPENDENCY_UNAVAILABLE", "the scheduler ended the heartbeat stream")
            if not self._stopping.is_set():
                assert isinstance(response, node_service_pb2.HeartbeatResponse)
                self._assignments.reconcile(response.assignments)
