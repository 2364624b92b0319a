"""The reconciler of endpoints on a real database, with a clock that a test moves, and a scheduler and engines that do
what it says."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from chassis.bus.outbox import Outbox
from chassis.clock import ManualClock
from chassis.db.pool import Pool
from chassis.errors import Aborted, NotFound, PermissionDenied, Unavailable
from chassis.ids import SystemIds
from finemesh.allocations.v1 import allocation_service_pb2 as allocations
from finemesh.events.v1 import usage_events_pb2
from formats.manifests import FileDigest
from services.inference.config import InferenceSettings
from services.inference.endpoints.claims import Claims
from services.inference.endpoints.domain import Endpoint, new_endpoint
from services.inference.endpoints.lifecycle import EndpointEvent, EndpointState
from services.inference.endpoints.reconciler import EndpointReconciler
from services.inference.endpoints.router import Router
from services.inference.endpoints.store import EndpointStore
from services.inference.endpoints.transitions import Transitions
from services.inference.engines.base import Engine, EngineFailed, EngineSettings
from services.inference.models.domain import BaseModel, ModelKind, TunedModel, Weights
from services.inference.models.store import ModelStore
from services.inference.serving.calls import Serving
from services.inference.serving.device_leases import DeviceLeases
from services.inference.serving.engine_pool import EnginePool
from services.inference.serving.target import Targets
from services.inference.spending.spend_guard import SpendGuard

ROUNDS_MAX = 200
PROJECT = "proj_a"
BASE = "finemesh/tiny"
_numbers = itertools.count(1)


class SteppedClock(ManualClock):
    """The wall clock may be set; the monotonic one does not see it."""

    _set_by = timedelta()

    def now(self) -> datetime:
        return super().now() + self._set_by

    def set_wall(self, seconds: float) -> None:
        self._set_by += timedelta(seconds=seconds)


class FakeScheduler:
    """A channel to a scheduler with one device for each owner. `away` refuses every call, `lost` ends every lease."""

    def __init__(self) -> None:
        self.away = False
        self.lease_s = 3600.0
        self.renewals: Counter[str] = Counter()
        self.before_answer: Callable[[], Awaitable[None]] | None = None
        self.leases: dict[str, int] = {}
        self.unknown_nodes: set[str] = set()
        self.foreign_nodes: set[str] = set()
        self._nodes: dict[str, str] = {}
        self._renewed: set[str] = set()
        self._tokens = itertools.count(1)

    def unary_unary(self, path: str, **_: Any) -> Callable[..., Any]:
        handler = getattr(self, "_" + path.rpartition("/")[2])

        async def call(request: Any, **_: Any) -> Any:
            await asyncio.sleep(0)
            if self.away:
                raise Unavailable("DEPENDENCY_UNAVAILABLE", "the scheduler is away")
            answer = handler(request)
            if self.before_answer is not None:
                await self.before_answer()
            return answer

        return call

    def holds(self, id: str) -> bool:
        """Whether the endpoint has devices."""
        return any(owner.endswith(f"/{id}") for owner in self.leases)

    def lose_all(self) -> None:
        self.leases.clear()

    def expire(self) -> None:
        """Ends the leases that nobody renewed since the last time."""
        self.leases = {owner: token for owner, token in self.leases.items() if owner in self._renewed}
        self._renewed.clear()

    def _CreateAllocation(self, request: allocations.CreateAllocationRequest) -> allocations.CreateAllocationResponse:
        if request.owner not in self.leases:
            if request.node in self.unknown_nodes:
                raise NotFound("NOT_FOUND", f"node {request.node} is not registered")
            if request.node in self.foreign_nodes:
                raise PermissionDenied("NODE_NOT_CERTIFIED", "the certificate does not speak for this node")
            self.leases[request.owner] = next(self._tokens)
            self._nodes[request.owner] = request.node or "local-0"
        given = allocations.Allocation(
            lease_token=self.leases[request.owner],
            node=self._nodes[request.owner],
            device_indices=[0],
            hardware_type="cpu",
        )
        return allocations.CreateAllocationResponse(allocation=given)

    def _RenewAllocation(self, request: allocations.RenewAllocationRequest) -> allocations.RenewAllocationResponse:
        if self.leases.get(request.owner) != request.lease_token:
            raise Aborted("LEASE_STALE", "the allocation is another's now")
        self.renewals[request.owner.rpartition("/")[2]] += 1
        self._renewed.add(request.owner)
        answer = allocations.RenewAllocationResponse()
        answer.allocation.lease_duration.FromMilliseconds(int(self.lease_s * 1000))
        return answer

    def _ReleaseAllocation(
        self, request: allocations.ReleaseAllocationRequest
    ) -> allocations.ReleaseAllocationResponse:
        if self.leases.get(request.owner) == request.lease_token:
            del self.leases[request.owner]
        return allocations.ReleaseAllocationResponse()


class Line:
    """The channel of one process to the scheduler, which may be cut."""

    def __init__(self, scheduler: FakeScheduler) -> None:
        self.cut = False
        self._scheduler = scheduler

    def unary_unary(self, path: str, **options: Any) -> Callable[..., Any]:
        through = self._scheduler.unary_unary(path, **options)

        async def call(request: Any, **options: Any) -> Any:
            if self.cut:
                raise Unavailable("DEPENDENCY_UNAVAILABLE", "the scheduler cannot be reached")
            return await through(request, **options)

        return call


class FakeEngine:
    """An engine that starts and stops when its workshop lets it."""

    def __init__(self, workshop: Workshop) -> None:
        self._workshop = workshop
        self.until_s = math.inf
        self._died: asyncio.Future[EngineFailed] = asyncio.get_running_loop().create_future()
        self.context_tokens_max = 512
        self.on_gpus = workshop.on_gpus

    async def start(self) -> None:
        self._workshop.alive.append(self)
        await self._workshop.may_start.wait()

    async def stop(self) -> None:
        await self._workshop.may_stop.wait()
        if self in self._workshop.alive:
            self._workshop.alive.remove(self)

    async def wait_failed(self) -> EngineFailed:
        return await self._died

    def serve_until(self, until_s: float) -> None:
        self.until_s = until_s

    def die(self) -> None:
        self._died.set_result(EngineFailed("killed"))


class Workshop:
    """All engines of one process that have memory: begun to start and not stopped yet."""

    def __init__(self) -> None:
        self.on_gpus = False
        self.settings: list[EngineSettings] = []
        self.alive: list[FakeEngine] = []
        self.may_start, self.may_stop = asyncio.Event(), asyncio.Event()
        self.may_start.set()
        self.may_stop.set()

    async def open_engine(self, path: Path, settings: EngineSettings) -> Engine:
        self.settings.append(settings)
        return FakeEngine(self)  # type: ignore[return-value]

    @asynccontextmanager
    async def use(self, weights: Weights) -> AsyncIterator[Path]:
        """In place of the cache of weights."""
        yield Path(weights.revision)


class EndpointWorld:
    """One process of inference as far as endpoints go; `restart` is another one on the same database, and so is a
    `beside`, with which it shares clock and scheduler."""

    def __init__(self, pool: Pool, settings: InferenceSettings, beside: EndpointWorld | None = None) -> None:
        self.pool = pool
        self.settings = settings
        self.clock: SteppedClock = beside.clock if beside else SteppedClock()
        self.scheduler: FakeScheduler = beside.scheduler if beside else FakeScheduler()
        self.outbox = Outbox(settings, clock=self.clock, ids=SystemIds())
        self.transitions = Transitions(self.outbox, self.clock)
        self.restart()

    def restart(self) -> None:
        """The process ends with all its engines, and a new one begins."""
        self.workshop = Workshop()
        engines = EnginePool(
            open_engine=self.workshop.open_engine, engines_max=self.settings.engines_max, clock=self.clock
        )
        meter: Any = None
        reservations: Any = None
        cache: Any = self.workshop
        self.line = Line(self.scheduler)
        channel: Any = self.line
        self.serving = Serving(
            Targets(self.pool), engines, cache, meter, reservations, settings=self.settings, clock=self.clock
        )
        self.claims = Claims(self.pool, owner=f"inf_{next(_numbers)}", settings=self.settings, clock=self.clock)
        self.claims.address = f"{self.claims.owner}:7103"
        self.router = Router(self.pool, self.serving, owner=self.claims.owner)
        self.reconciler = EndpointReconciler(
            self.pool,
            self.outbox,
            self.transitions,
            self.router,
            self.serving,
            SpendGuard(self.pool, poll_s=1, clock=self.clock),
            self.claims,
            DeviceLeases(channel, settings=self.settings, clock=self.clock),
            settings=self.settings,
            clock=self.clock,
        )

    async def create(self, model: str = BASE) -> str:
        """A new endpoint; returns its id."""
        id = f"ep_{next(_numbers)}"
        endpoint = new_endpoint(
            id=id,
            project_id=PROJECT,
            organization_id="org",
            endpoint_id=f"demo/{id}",
            model=model,
            created_at=self.clock.now(),
        )
        async with self.pool.acquire() as connection:
            assert await EndpointStore(connection).add(endpoint, request_id=None, request_sha256="")
        return id

    async def get(self, id: str) -> Endpoint:
        async with self.pool.acquire() as connection:
            found = await EndpointStore(connection).find(PROJECT, id=id)
        assert found is not None
        return found

    async def stop(self, id: str) -> None:
        """What the owner's call does."""
        async with self.pool.acquire() as connection, connection.transaction():
            found = await EndpointStore(connection).find(PROJECT, id=id)
            assert found is not None
            assert await self.transitions.move(connection, found, EndpointEvent.STOP)

    async def look(self) -> None:
        """One look at all endpoints, and what it began."""
        await self.reconciler.look()
        await self.reconciler.settle()
        await self.breathe()

    async def breathe(self) -> None:
        """Lets go on what a finished start or a dead engine woke."""
        for _ in range(10):
            await asyncio.sleep(0)

    async def reaches(self, id: str, state: EndpointState) -> Endpoint:
        """Looks until the endpoint is in that state; time stands still."""
        for _ in range(ROUNDS_MAX):
            if (found := await self.get(id)).state == state:
                return found
            await self.look()
        raise AssertionError(f"the endpoint is {found.state}: {found.status_message}")

    async def pass_time(self, seconds: float, *, step_s: float = 1.0) -> None:
        """Looks every `step_s` for that long."""
        for _ in range(round(seconds / step_s)):
            await self.clock.advance(step_s)
            await self.look()

    async def outlast_claims_of_others(self) -> None:
        """Watches until the claims that nobody else renews are over, and the leases of their devices."""
        over = "UPDATE endpoints SET claim_until = now() - interval '1 second' WHERE owner NOT IN ('', $1)"
        await self.pool.execute(over, self.claims.owner)
        self.scheduler.expire()
        await self.pass_time(self.settings.claim_duration_s + 1)
        self.scheduler.expire()

    async def minutes(self, id: str) -> list[usage_events_pb2.EndpointMinuteRecorded]:
        """What billing will hear of the endpoint."""
        rows = await self.pool.fetch("SELECT payload FROM outbox WHERE subject = 'usage.endpoint.minute_recorded'")
        events = [usage_events_pb2.EndpointMinuteRecorded.FromString(row["payload"]) for row in rows]
        return [event for event in events if event.endpoint.endswith(f"/{id}")]


async def add_tuned(pool: Pool, name: str = "demo/tuned") -> str:
    """Registers a model that was tuned as a whole; returns its id."""
    id = f"ml_{next(_numbers)}"
    files = (FileDigest(path="model.safetensors", size_bytes=1, sha256="0"),)
    model = TunedModel(
        id=id,
        project_id=PROJECT,
        model_id=name,
        kind=ModelKind.FULL,
        base_model=BASE,
        base_revision="rv_base",
        weights=Weights(revision=f"rv_{id}", key=f"models/{id}/", files=files),
        adapter_rank=0,
        tuning_job=f"projects/{PROJECT}/tuningJobs/{id}",
        lineage={},
        created_at=datetime(2030, 1, 1, tzinfo=UTC),
    )
    async with pool.acquire() as connection:
        assert await ModelStore(connection).add(model)
    return id


async def add_base(pool: Pool, revision: str = "rv_base") -> None:
    """Imports the base model, or imports it again with other contents."""
    files = (FileDigest(path="model.safetensors", size_bytes=1, sha256="0"),)
    model = BaseModel(
        model_id=BASE,
        weights=Weights(revision=revision, key=f"base/{revision}/", files=files),
        architecture="LlamaForCausalLM",
        parameter_count=1,
        context_tokens_max=512,
        size_bytes=1,
        created_at=datetime(2030, 1, 1, tzinfo=UTC),
    )
    async with pool.acquire() as connection, connection.transaction():
        await ModelStore(connection).save_base(model)
