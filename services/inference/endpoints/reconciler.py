"""Drives every endpoint to the state that its owner wants. Not pure: database, gRPC, events.

It asks the scheduler for devices, starts an engine, bills minutes that served and in the end gives everything back.
Each look finds the endpoints that this process has to move and takes one step for each, in a task of its own: what is
slow or broken for one is nobody else's trouble. Nothing waits for the network or an engine inside a transaction, and
each change is guarded by the state and the lease token that it was decided on. It knows no message of a caller.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from datetime import datetime
from typing import Any

import structlog

from chassis.bus.outbox import Outbox
from chassis.clock import Clock
from chassis.db.pool import Pool, transaction
from chassis.errors import Aborted, DomainError, NotFound
from chassis.rounds import Signal, run_rounds
from services.inference.config import InferenceSettings
from services.inference.endpoints import convert
from services.inference.endpoints.claims import Claims
from services.inference.endpoints.domain import Endpoint
from services.inference.endpoints.lifecycle import EndpointEvent, EndpointState
from services.inference.endpoints.minute_meter import MinuteMeter
from services.inference.endpoints.router import Router
from services.inference.endpoints.store import EndpointStore
from services.inference.endpoints.transitions import Transitions
from services.inference.serving.calls import Serving
from services.inference.serving.device_leases import DeviceLeases
from services.inference.serving.trouble import is_passing
from services.inference.spending.spend_guard import SpendGuard

STATUS_CHARS_MAX = 1000
log = structlog.get_logger()


class EndpointReconciler:
    """One loop over the endpoints that this process holds, and over those that nobody holds and that want something; at
    most one step for each at a time."""

    def __init__(
        self,
        pool: Pool,
        outbox: Outbox,
        transitions: Transitions,
        router: Router,
        serving: Serving,
        spend_guard: SpendGuard,
        claims: Claims,
        devices: DeviceLeases,
        *,
        settings: InferenceSettings,
        clock: Clock,
    ) -> None:
        self._pool = pool
        self._minutes = MinuteMeter(outbox, settings=settings)
        self._transitions = transitions
        self._router = router
        self._serving = serving
        self._spend_guard = spend_guard
        self._claims = claims
        self._devices = devices
        self._settings = settings
        self._clock = clock
        self._woken = Signal()
        self._steps: dict[str, asyncio.Task[None]] = {}
        self._leaving = False
        # What this process said last of an endpoint that waits; others say something else of their nodes.
        self._waits: dict[str, str] = {}
        # By lease: what one lease has says nothing of the next.
        self._held: dict[str, Endpoint] = {}
        self._until_s: dict[str, float] = {}
        self._starting: dict[str, asyncio.Task[None]] = {}

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
        over_by = await self._claims.look()
        held, own, waiting = dict(self._held), set[str](), set[str]()
        async for endpoint, under_way in self._endpoints(over_by):
            if endpoint.owner == self._claims.owner:
                own.add(convert.lease_key(endpoint))
            if endpoint.state == EndpointState.PENDING:
                waiting.add(endpoint.id)
            if not under_way:
                self._begin(endpoint.id, endpoint, self._look_after(endpoint, over_by))
        for key in held.keys() - own:
            self._begin(key, held[key], self._leave(held[key]))
        for id in self._waits.keys() - waiting:
            del self._waits[id]

    def _begin(self, key: str, endpoint: Endpoint, work: Coroutine[Any, Any, None]) -> None:
        """One step at a time under a key: the endpoint's id, or a lease that is its own no more."""
        if key in self._steps:
            work.close()
            return
        step = self._step(endpoint, work)
        task = asyncio.create_task(step, name=f"endpoint-{key}", context=contextvars.Context())
        self._steps[key] = task
        task.add_done_callback(functools.partial(self._ended, key))

    def _ended(self, key: str, _: asyncio.Task[None]) -> None:
        del self._steps[key]

    async def settle(self) -> None:
        """Waits for the steps that are under way."""
        if self._steps:
            await asyncio.wait(list(self._steps.values()))

    async def stop_taking(self) -> None:
        """From here on this process only looks after what it holds."""
        self._leaving = True

    async def hand_over(self) -> None:
        """Gives everything up at the end of the process, in good order: another one starts it again at once."""
        await self.settle()
        async with self._pool.acquire() as connection:
            own = await EndpointStore(connection).list_owned(self._claims.owner)
        for endpoint in own:
            stopping = endpoint.state == EndpointState.STOPPING
            why = "its process stopped; it is started again"
            self._begin(endpoint.id, endpoint, self._stop(endpoint) if stopping else self._lose(endpoint, why))
        await self.settle()

    async def _endpoints(self, over_by: datetime | None) -> AsyncIterator[tuple[Endpoint, bool]]:
        """All endpoints that this process has to look after, page by page, each with whether a step of it was under way
        when it was read: such a row may be older than what the step did."""
        now, page_size = self._clock.now(), self._settings.endpoints_batch_max
        pages: tuple[Callable[[EndpointStore, Endpoint | None], Awaitable[list[Endpoint]]], ...] = (
            lambda store, after: store.list_moving(self._claims.owner, over_by, after, page_size),
            lambda store, after: store.list_resumable(now, after, page_size),
        )
        for read in pages:
            after: Endpoint | None = None
            while True:
                under_way = set(self._steps)
                async with self._pool.acquire() as connection:
                    page = await read(EndpointStore(connection), after)
                for endpoint in page:
                    yield endpoint, endpoint.id in under_way
                if len(page) < page_size:
                    break
                after = page[-1]

    async def _step(self, endpoint: Endpoint, work: Coroutine[Any, Any, None]) -> None:
        """One step; passing trouble is waited out, and a defect ends the step and nothing else."""
        try:
            try:
                await work
            except DomainError as error:
                if is_passing(error):
                    raise
                await self._fail(endpoint, str(error))
        except Exception as error:
            if is_passing(error):
                log.warning("endpoint_waits", endpoint=endpoint.id, error=str(error))
            else:
                log.error("endpoint_step_failed", endpoint=endpoint.id, exc_info=error)

    async def _look_after(self, endpoint: Endpoint, over_by: datetime | None) -> None:
        if endpoint.owner not in ("", self._claims.owner):
            await self._take_away(endpoint, over_by)
            return
        state = EndpointState(endpoint.state)
        why_refused = self._spend_guard.why_refused(
            organization_id=endpoint.organization_id, project_id=endpoint.project_id
        )
        match state:
            case EndpointState.PENDING | EndpointState.STARTING | EndpointState.READY if why_refused:
                await self._park(endpoint, why_refused)
            case EndpointState.PARKED if not why_refused:
                await self._unpark(endpoint)
            case EndpointState.PENDING if not self._leaving and not self._still_holds(endpoint):
                await self._allocate(endpoint)
            case EndpointState.STARTING | EndpointState.READY if self._is_cut_off(endpoint):
                await self._lose(endpoint, "cut off from the scheduler; it is started again")
            case EndpointState.STARTING:
                if await self._renew(endpoint):
                    await self._bring_up(endpoint)
            case EndpointState.READY:
                await self._keep(endpoint)
            case EndpointState.STOPPING:
                await self._stop(endpoint)

    async def _take_away(self, endpoint: Endpoint, over_by: datetime | None) -> None:
        """Ends the claim of a process that is away. Its devices stay leased until nobody renews them any more, because
        its engine may still be there."""
        stopping = endpoint.state == EndpointState.STOPPING
        event = EndpointEvent.STOPPED if stopping else EndpointEvent.LOSE
        why = "" if stopping else "the process that served it is away; it is started again"
        async with transaction(self._pool) as connection:
            moved = await self._transitions.move(connection, endpoint, event, why, over_by=over_by)
        if moved is not None:
            log.warning("endpoint_taken_away", endpoint=endpoint.id, owner=endpoint.owner)
            self.wake()

    def _still_holds(self, endpoint: Endpoint) -> bool:
        """Whether something of an earlier lease is left in this process."""
        return any(held.id == endpoint.id for held in self._held.values())

    async def _leave(self, endpoint: Endpoint) -> None:
        """Ends what is left here of an endpoint that was taken away meanwhile."""
        log.warning("endpoint_claim_lost", endpoint=endpoint.id, lease_token=endpoint.lease_token)
        await self._release(endpoint)

    async def _allocate(self, endpoint: Endpoint) -> None:
        owner = convert.endpoint_name(endpoint)
        given = await self._devices.ask(owner, hardware_type=endpoint.hardware_type, count=endpoint.gpu_count)
        if isinstance(given, str):
            await self._say_what_it_waits_for(endpoint, given)
            return
        found: Endpoint | None = None
        async with transaction(self._pool) as connection:
            claimed = await self._claims.take(connection, endpoint, given)
            if claimed is None:
                found = await EndpointStore(connection).find(endpoint.project_id, id=endpoint.id)
            else:
                await self._transitions.move(connection, claimed, EndpointEvent.ALLOCATE, "the engine starts")
        if claimed is not None:
            self._held[convert.lease_key(claimed)] = claimed
        elif found is not None and found.lease_after >= given.lease_token:
            await self._say_what_it_waits_for(found, "the devices of the process that served it before")
            return
        elif found is None or found.lease_token != given.lease_token:
            # Its owner stopped it while the scheduler answered.
            await self._devices.give_back(owner, given.lease_token)
        self.wake()

    async def _say_what_it_waits_for(self, endpoint: Endpoint, what: str) -> None:
        if self._waits.get(endpoint.id) != what:
            async with transaction(self._pool) as connection:
                await EndpointStore(connection).set_status(endpoint.id, f"waits for {what}")
            self._waits[endpoint.id] = what

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
                await self._minutes.bill(connection, serving, self._minutes.due(serving, now, confirmed_s))
        self._minutes.wake()
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
            due = self._minutes.due(endpoint, now, asked_s)
            if due is not None:
                async with transaction(self._pool) as connection:
                    await self._minutes.bill(connection, endpoint, due)
                self._minutes.wake()
        else:
            await self._lose(endpoint, "the engine stopped; it is started again")

    async def _renew(self, endpoint: Endpoint) -> bool:
        """False when the devices are somebody else's now; then the endpoint has begun again."""
        key = convert.lease_key(endpoint)
        try:
            until_s = await self._devices.renew(convert.endpoint_name(endpoint), endpoint.lease_token or 0)
        except (Aborted, NotFound) as error:
            await self._lose(endpoint, f"the devices were lost: {error.message}")
            return False
        self._until_s[key] = until_s
        self._serving.serve_until(key, until_s)
        return True

    def _is_cut_off(self, endpoint: Endpoint) -> bool:
        """Whether the devices may be another's by now. Then the engine has ended by itself, and another process, which
        the scheduler hears, may have the endpoint."""
        return self._clock.monotonic() > self._until_s.get(convert.lease_key(endpoint), math.inf)

    async def _lose(self, endpoint: Endpoint, why: str) -> None:
        """It begins again, here or elsewhere. Devices that the scheduler cannot take back now end by themselves."""
        try:
            await self._wind_up(endpoint)
        except DomainError as error:
            if not is_passing(error):
                raise
            log.warning("devices_left_to_expire", endpoint=endpoint.id, error=str(error))
        async with transaction(self._pool) as connection:
            await self._transitions.move(connection, endpoint, EndpointEvent.LOSE, why)
        self.wake()

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
        self._minutes.forget(endpoint)
        self._until_s.pop(key, None)
        starting = self._starting.pop(key, None)
        if starting is not None:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
        await self._serving.drop(key)
        await self._devices.give_back(convert.endpoint_name(endpoint), endpoint.lease_token or 0)
        self._held.pop(key, None)
