"""Drives every endpoint to the state that its owner wants. Not pure: database, gRPC, events.

It asks the scheduler for devices, starts an engine, bills minutes that served and in the end gives everything back.
Each look finds all endpoints that must move and takes one step for each, in a task of its own: what is slow or broken
for one is nobody else's trouble. Nothing waits for the network or an engine inside a transaction, and each change is
guarded by the state and the lease token that it was decided on. It knows no message of a caller.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime

import grpc
import structlog

from chassis.bus.outbox import Outbox
from chassis.clock import Clock
from chassis.db.pool import Connection, Pool, transaction
from chassis.errors import Aborted, DomainError, NotFound
from chassis.rounds import Signal, run_rounds
from finemesh.allocations.v1 import allocation_service_pb2, allocation_service_pb2_grpc
from services.inference.config import InferenceSettings
from services.inference.endpoints import convert
from services.inference.endpoints.domain import Endpoint
from services.inference.endpoints.lifecycle import EndpointEvent, EndpointState
from services.inference.endpoints.minutes import DueMinutes, ServedTime
from services.inference.endpoints.router import Router
from services.inference.endpoints.store import EndpointStore
from services.inference.endpoints.transitions import Transitions
from services.inference.serving.calls import Serving
from services.inference.serving.trouble import is_passing
from services.inference.spending.spend_guard import SpendGuard

STATUS_CHARS_MAX = 1000
log = structlog.get_logger()


class EndpointReconciler:
    """One loop over all endpoints that hold or want devices; at most one step for each at a time."""

    def __init__(
        self,
        pool: Pool,
        outbox: Outbox,
        transitions: Transitions,
        router: Router,
        serving: Serving,
        spend_guard: SpendGuard,
        scheduler: grpc.aio.Channel,
        *,
        settings: InferenceSettings,
        clock: Clock,
    ) -> None:
        self._pool = pool
        self._outbox = outbox
        self._transitions = transitions
        self._router = router
        self._serving = serving
        self._spend_guard = spend_guard
        self._allocations = allocation_service_pb2_grpc.AllocationServiceStub(scheduler)
        self._settings = settings
        self._clock = clock
        self._woken = Signal()
        self._steps: dict[str, asyncio.Task[None]] = {}
        # By lease: a start and the minutes of one lease say nothing of the next.
        self._starting: dict[str, asyncio.Task[None]] = {}
        self._served: dict[str, ServedTime] = {}

    def wake(self) -> None:
        """Look now instead of at the next poll."""
        self._woken.send()

    async def run(self) -> None:
        """Looks after the endpoints until cancelled."""
        try:
            await run_rounds(
                "endpoint_reconciler",
                self.look,
                wait=lambda: self._woken.wait(self._settings.endpoint_poll_s),
                clock=self._clock,
                is_passing=is_passing,
            )
        finally:
            for task in (*self._steps.values(), *self._starting.values()):
                task.cancel()

    async def look(self) -> None:
        """Begins a step for every endpoint that must move and has none under way."""
        async for endpoint in self._endpoints():
            if endpoint.id not in self._steps:
                task = asyncio.create_task(
                    self._step(endpoint), name=f"endpoint-{endpoint.id}", context=contextvars.Context()
                )
                self._steps[endpoint.id] = task
                task.add_done_callback(functools.partial(self._ended, endpoint.id))

    def _ended(self, id: str, _: asyncio.Task[None]) -> None:
        del self._steps[id]

    async def settle(self) -> None:
        """Waits for the steps that are under way."""
        if self._steps:
            await asyncio.wait(list(self._steps.values()))

    async def _endpoints(self) -> AsyncIterator[Endpoint]:
        """All endpoints that somebody has to look after, page by page; none that had a step under way when it was read,
        because such a row may be older than what the step did."""
        now, page_size = self._clock.now(), self._settings.endpoints_batch_max
        pages: tuple[Callable[[EndpointStore, Endpoint | None], Awaitable[list[Endpoint]]], ...] = (
            lambda store, after: store.list_moving(after, page_size),
            lambda store, after: store.list_resumable(now, after, page_size),
        )
        for read in pages:
            after: Endpoint | None = None
            while True:
                under_way = set(self._steps)
                async with self._pool.acquire() as connection:
                    page = await read(EndpointStore(connection), after)
                for endpoint in page:
                    if endpoint.id not in under_way:
                        yield endpoint
                if len(page) < page_size:
                    break
                after = page[-1]

    async def _step(self, endpoint: Endpoint) -> None:
        """One step; passing trouble is waited out, and a defect ends the step and nothing else."""
        try:
            try:
                await self._look_after(endpoint)
            except DomainError as error:
                if is_passing(error):
                    raise
                await self._fail(endpoint, str(error))
        except Exception as error:
            if is_passing(error):
                log.warning("endpoint_waits", endpoint=endpoint.id, error=str(error))
            else:
                log.error("endpoint_step_failed", endpoint=endpoint.id, exc_info=error)

    async def _look_after(self, endpoint: Endpoint) -> None:
        state = EndpointState(endpoint.state)
        why_refused = self._spend_guard.why_refused(
            organization_id=endpoint.organization_id, project_id=endpoint.project_id
        )
        match state:
            case EndpointState.PENDING | EndpointState.STARTING | EndpointState.READY if why_refused:
                await self._park(endpoint, why_refused)
            case EndpointState.PARKED if not why_refused:
                await self._unpark(endpoint)
            case EndpointState.PENDING:
                await self._allocate(endpoint)
            case EndpointState.STARTING:
                if await self._renew(endpoint):
                    await self._bring_up(endpoint)
            case EndpointState.READY:
                await self._keep(endpoint)
            case EndpointState.STOPPING:
                await self._stop(endpoint)

    async def _allocate(self, endpoint: Endpoint) -> None:
        answer = await self._allocations.CreateAllocation(convert.allocation_request_to_proto(endpoint))
        if not answer.HasField("allocation"):
            async with transaction(self._pool) as connection:
                await EndpointStore(connection).set_status(endpoint.id, f"waits for {answer.waiting_for}")
            return
        given = answer.allocation
        async with transaction(self._pool) as connection:
            moved = await self._transitions.move(connection, endpoint, EndpointEvent.ALLOCATE, "the engine starts")
            if moved is not None:
                await EndpointStore(connection).set_allocation(
                    endpoint.id,
                    lease_token=given.lease_token,
                    device_indices=tuple(given.device_indices),
                    hardware_type=given.hardware_type,
                )
            else:
                found = await EndpointStore(connection).find(endpoint.project_id, id=endpoint.id)
        if moved is None and (found is None or found.lease_token != given.lease_token):
            # Its owner stopped it while the scheduler answered.
            await self._give_back(endpoint, given.lease_token)
        self.wake()

    async def _bring_up(self, endpoint: Endpoint) -> None:
        """Starts the engine in a task of its own, once; after a restart of this service as well. READY when it runs."""
        key = convert.lease_key(endpoint)
        starting = self._starting.get(key)
        if starting is None:
            starting = asyncio.create_task(
                self._start_engine(endpoint), name=f"engine-of-{endpoint.id}", context=contextvars.Context()
            )
            self._starting[key] = starting
            starting.add_done_callback(lambda _: self.wake())
        if not starting.done():
            return
        del self._starting[key]
        error = starting.exception()
        if error is not None:
            # After passing trouble the next look starts again.
            if isinstance(error, DomainError) or (isinstance(error, Exception) and is_passing(error)):
                raise error
            log.error("engine_start_failed", endpoint=endpoint.id, exc_info=error)
            await self._fail(endpoint, "the engine did not start, for a reason that the log of this service has")
            return
        now, confirmed_s = self._clock.now(), self._clock.monotonic()
        async with transaction(self._pool) as connection:
            serving = await self._transitions.move(connection, endpoint, EndpointEvent.SERVE)
            if serving is not None:
                # Calls come in from here on, so the first minute begins with the state that lets them in: an endpoint
                # that is stopped before the next look has served, too.
                await self._bill(connection, serving, self._due(serving, now, confirmed_s))
        self._outbox.wake()
        self.wake()

    async def _start_engine(self, endpoint: Endpoint) -> None:
        target = await self._router.endpoint_target(endpoint)
        await self._serving.start(target)

    async def _keep(self, endpoint: Endpoint) -> None:
        """Renews the devices, bills begun minutes, and begins again when the engine or the devices are gone."""
        # NotFound when its model was deleted: then it ends.
        await self._router.endpoint_target(endpoint)
        # Before the request: what the scheduler confirms is that the devices were its own when it was asked.
        now, asked_s = self._clock.now(), self._clock.monotonic()
        if not await self._renew(endpoint):
            return
        if self._serving.is_running(convert.lease_key(endpoint)):
            due = self._due(endpoint, now, asked_s)
            if due is not None:
                async with transaction(self._pool) as connection:
                    await self._bill(connection, endpoint, due)
                self._outbox.wake()
        else:
            await self._lose(endpoint, "the engine stopped; it is started again")

    async def _renew(self, endpoint: Endpoint) -> bool:
        """False when the devices are somebody else's now; then the endpoint has begun again."""
        request = allocation_service_pb2.RenewAllocationRequest(
            owner=convert.endpoint_name(endpoint), lease_token=endpoint.lease_token or 0
        )
        try:
            await self._allocations.RenewAllocation(request)
        except (Aborted, NotFound) as error:
            await self._lose(endpoint, f"the devices were lost: {error.message}")
            return False
        return True

    async def _lose(self, endpoint: Endpoint, why: str) -> None:
        await self._wind_up(endpoint)
        async with transaction(self._pool) as connection:
            await self._transitions.move(connection, endpoint, EndpointEvent.LOSE, why)
        self.wake()

    def _due(self, endpoint: Endpoint, now: datetime, confirmed_s: float) -> DueMinutes | None:
        """The minutes that were begun up to this confirmation and are not billed."""
        served = self._served.setdefault(
            convert.lease_key(endpoint),
            ServedTime(minute_s=self._settings.endpoint_minute_s, silence_s_max=self._settings.endpoint_silence_s_max),
        )
        return served.confirm(now, confirmed_s, endpoint.paid_until)

    async def _bill(self, connection: Connection, endpoint: Endpoint, due: DueMinutes | None) -> None:
        """Emits every due minute in the transaction that counts it; none when somebody else counted."""
        if due is None or not await EndpointStore(connection).bill_minutes(endpoint, due):
            return
        for number in range(due.count):
            begun = due.begin + number * due.minute
            event = convert.endpoint_minute_to_proto(endpoint, endpoint.billed_minutes + number, begun)
            await self._outbox.add(connection, event, subject_name=event.endpoint, key=event.work_key)

    async def _stop(self, endpoint: Endpoint) -> None:
        """Frees the engine and the devices, then says STOPPED."""
        await self._wind_up(endpoint)
        async with transaction(self._pool) as connection:
            await self._transitions.move(connection, endpoint, EndpointEvent.STOPPED)
        self.wake()

    async def _park(self, endpoint: Endpoint, why: str) -> None:
        """As a stop, but it stays on the list of those that start again by themselves."""
        log.warning("endpoint_parked", endpoint=endpoint.id, why=why)
        await self._wind_up(endpoint)
        async with transaction(self._pool) as connection:
            await self._transitions.move(connection, endpoint, EndpointEvent.PARK, why[:STATUS_CHARS_MAX])

    async def _unpark(self, endpoint: Endpoint) -> None:
        log.info("endpoint_resumed", endpoint=endpoint.id)
        async with transaction(self._pool) as connection:
            await self._transitions.move(
                connection, endpoint, EndpointEvent.UNPARK, "may spend again; waits for devices"
            )
        self.wake()

    async def _wind_up(self, endpoint: Endpoint) -> None:
        if endpoint.lease_token is not None:
            await self._release(endpoint)

    async def _fail(self, endpoint: Endpoint, why: str) -> None:
        log.error("endpoint_failed", endpoint=endpoint.id, error=why)
        await self._wind_up(endpoint)
        async with transaction(self._pool) as connection:
            await self._transitions.move(connection, endpoint, EndpointEvent.FAIL, why[:STATUS_CHARS_MAX])

    async def _release(self, endpoint: Endpoint) -> None:
        """Ends the start or the engine under this lease, whatever it was started with, then gives the devices back."""
        key = convert.lease_key(endpoint)
        self._served.pop(key, None)
        starting = self._starting.pop(key, None)
        if starting is not None:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
        await self._serving.drop(key)
        await self._give_back(endpoint, endpoint.lease_token or 0)

    async def _give_back(self, endpoint: Endpoint, lease_token: int) -> None:
        """Also devices that are gone already."""
        request = allocation_service_pb2.ReleaseAllocationRequest(
            owner=convert.endpoint_name(endpoint), lease_token=lease_token
        )
        await self._allocations.ReleaseAllocation(request)
