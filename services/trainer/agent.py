"""The agent: keeps in touch with the scheduler and makes this node's work equal to what the last heartbeat said.

Level-triggered: every response holds all assignments, so that a lost one costs nothing. It decides no order and no place.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING

import grpc
import structlog

from chassis.backoff import Backoff
from chassis.errors import DomainError, Unavailable
from chassis.rpc.channel import NO_DEADLINE
from finemesh.nodes.v1 import node_pb2, node_service_pb2
from services.trainer.attempt import Attempt, Kit
from services.trainer.following import attempt_for
from services.trainer.train.data.preparation.fingerprint import preparation_version

if TYPE_CHECKING:
    _Stream = grpc.aio.StreamStreamCall[node_service_pb2.HeartbeatRequest, node_service_pb2.HeartbeatResponse]

log = structlog.get_logger()

VERSION = "0.1.0"
ENDED_TOKENS_MAX = 10_000
# Silence of this many heartbeats ends a connection that only looks alive.
SILENT_HEARTBEATS_MAX = 5
SILENCE_S_MIN = 2.0
# What a heartbeat or registration is answered with when a newer incarnation of this node exists.
_NAME_TAKEN = frozenset({"LEASE_STALE", "STATE_CONFLICT"})
# After a failed write the reason arrives where we read, within this time.
_REASON_WAIT_S = 1.0


class Agent:
    """`run` until `stop_working`; then `release` waits for the last reports."""

    def __init__(
        self, kit: Kit, *, incarnation: str, address: str, on_registered: Callable[[], Awaitable[None]]
    ) -> None:
        self._kit = kit
        self._on_registered = on_registered
        self._incarnation = incarnation
        self._address = address
        self._attempts: dict[int, tuple[Attempt, asyncio.Task[None]]] = {}
        # A response that was on its way while an attempt ended must not start it again.
        self._ended_tokens: OrderedDict[int, None] = OrderedDict()
        self._device_locks = {index: asyncio.Lock() for index in kit.devices}
        self._abandoned_tokens: set[int] = set()
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Keeps in touch for ever; raises only when another agent took this node's name."""
        settings = self._kit.settings
        backoff = Backoff(first_s=settings.reconnect_backoff_s_min, last_s=settings.reconnect_backoff_s_max)
        while not self._stopping.is_set():
            try:
                interval_s = await self._register()
                await self._on_registered()
                backoff.reset()
                self._fill_free_devices()
                await self._keep_in_touch(interval_s)
            except DomainError as error:
                log.warning("out of touch with the scheduler", error=str(error))
                if error.reason in _NAME_TAKEN:
                    log.error("another agent registered as this node; this one stops", node=settings.node_name)
                    self._abandon_all()
                    raise
            await self._kit.clock.sleep(backoff.next_s())

    async def stop_working(self) -> None:
        """No more heartbeats and no more work: every child dies now, its attempt still reports."""
        self._stopping.set()
        for attempt, _ in self._attempts.values():
            attempt.release()
        await self._kit.warm.close()

    async def release(self) -> None:
        """Returns when every attempt has reported its ending; the leases of those that cannot just run out."""
        tasks = [task for _, task in self._attempts.values()]
        try:
            await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            self._abandon_all()

    async def _register(self) -> float:
        """The interval between heartbeats, in seconds."""
        devices = [
            node_pb2.Device(
                index=device.index,
                hardware_type=device.hardware_type,
                memory_bytes=device.memory_bytes,
                uuid=device.uuid,
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
            )
        )
        interval_s: float = answer.heartbeat_interval.ToMilliseconds() / 1000
        log.info("registered", node=self._kit.settings.node_name, heartbeat_interval_s=interval_s)
        return max(interval_s, 0.01)

    async def _keep_in_touch(self, interval_s: float) -> None:
        """Until the stream breaks (DomainError) or the agent stops."""
        stream = self._kit.stub.Heartbeat(timeout=NO_DEADLINE)
        hearing = asyncio.create_task(self._hear_responses(stream, interval_s))
        sending = asyncio.create_task(self._send_heartbeats(stream, interval_s))
        try:
            await asyncio.wait((hearing, sending), return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait((hearing,), timeout=_REASON_WAIT_S)
        finally:
            hearing.cancel()
            sending.cancel()
            await asyncio.wait((hearing, sending))
            stream.cancel()
        for task in (hearing, sending):
            error = None if task.cancelled() else task.exception()
            if error is not None:
                raise error

    async def _send_heartbeats(self, stream: "_Stream", interval_s: float) -> None:
        while not self._stopping.is_set():
            request = node_service_pb2.HeartbeatRequest(
                node=self._kit.settings.node_name, incarnation=self._incarnation, lease_tokens=list(self._attempts)
            )
            try:
                await stream.write(request)
            except asyncio.InvalidStateError:
                raise Unavailable("DEPENDENCY_UNAVAILABLE", "the heartbeat stream is over") from None
            await self._sleep_unless_stopping(interval_s)

    async def _sleep_unless_stopping(self, seconds: float) -> None:
        sleep = asyncio.ensure_future(self._kit.clock.sleep(seconds))
        stop = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait((sleep, stop), return_when=asyncio.FIRST_COMPLETED)
        finally:
            sleep.cancel()
            stop.cancel()

    async def _hear_responses(self, stream: "_Stream", interval_s: float) -> None:
        silence_s = max(SILENT_HEARTBEATS_MAX * interval_s, SILENCE_S_MIN)
        while True:
            try:
                async with asyncio.timeout(silence_s):
                    response = await stream.read()
            except TimeoutError:
                raise Unavailable("DEPENDENCY_UNAVAILABLE", "the scheduler does not answer heartbeats") from None
            if response is grpc.aio.EOF:
                raise Unavailable("DEPENDENCY_UNAVAILABLE", "the scheduler ended the heartbeat stream")
            if not self._stopping.is_set():
                assert isinstance(response, node_service_pb2.HeartbeatResponse)
                self._reconcile(response.assignments)

    def _reconcile(self, assignments: Iterable[node_pb2.Assignment]) -> None:
        wanted = {assignment.lease.token: assignment for assignment in assignments}
        for token in self._attempts.keys() - wanted.keys() - self._abandoned_tokens:
            if self._attempts[token][0].is_ending:
                continue
            log.warning("no longer assigned", lease_token=token)
            self._abandon(token)
        for token, assignment in wanted.items():
            if token not in self._attempts and token not in self._ended_tokens:
                self._start(assignment)
            if token in self._attempts and assignment.desired_state == node_pb2.DESIRED_STATE_CANCEL:
                self._attempts[token][0].cancel()

    def _start(self, assignment: node_pb2.Assignment) -> None:
        attempt = attempt_for(assignment, self._kit)
        log.info("assigned", job=attempt.job_id, lease_token=attempt.token)
        task = asyncio.create_task(self._run(attempt, sorted(set(assignment.device_indices))))
        self._attempts[attempt.token] = (attempt, task)
        task.add_done_callback(lambda _: self._forget(attempt.token))

    async def _run(self, attempt: Attempt, device_indices: list[int]) -> None:
        # A device is taken when the attempt before has left it, its child dead and its memory free.
        locks = [self._device_locks[index] for index in device_indices if index in self._device_locks]
        taken: list[asyncio.Lock] = []
        try:
            for lock in locks:
                await lock.acquire()
                taken.append(lock)
            await attempt.run()
        except Exception:
            log.exception("attempt broke", lease_token=attempt.token)
        finally:
            for lock in taken:
                lock.release()
            self._fill_free_devices()

    def _fill_free_devices(self) -> None:
        """A child waits where nothing runs: it would take memory and seconds of the CPU from what does."""
        for index, lock in self._device_locks.items():
            if not lock.locked() and not self._stopping.is_set():
                self._kit.warm.fill(index)

    def _abandon(self, token: int) -> None:
        # Once: a second cancellation would reach the clean-up that the first one began.
        if token not in self._abandoned_tokens:
            self._abandoned_tokens.add(token)
            self._attempts[token][1].cancel()

    def _abandon_all(self) -> None:
        for token in list(self._attempts):
            self._abandon(token)

    def _forget(self, token: int) -> None:
        del self._attempts[token]
        self._abandoned_tokens.discard(token)
        self._ended_tokens[token] = None
        if len(self._ended_tokens) > ENDED_TOKENS_MAX:
            self._ended_tokens.popitem(last=False)
