"""The reconciler of endpoints on a real database, with a clock that a test moves, and a scheduler and engines that do
what it says."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from chassis.bus.outbox import Outbox
from chassis.clock import ManualClock
from chassis.db.pool import Pool
from chassis.errors import Aborted, Unavailable
from chassis.ids import SystemIds
from finemesh.allocations.v1 import allocation_service_pb2 as allocations
from finemesh.events.v1 import usage_events_pb2
from formats.manifests import FileDigest
from services.inference.config import InferenceSettings
from services.inference.endpoints.domain import Endpoint
from services.inference.endpoints.lifecycle import EndpointEvent, EndpointState
from services.inference.endpoints.reconciler import EndpointReconciler
from services.inference.endpoints.router import Router
from services.inference.endpoints.store import EndpointStore
from services.inference.endpoints.transitions import Transitions
from services.inference.models.domain import BaseModel, Weights
from services.inference.models.store import ModelStore
from services.inference.serving.target import Target
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
        self.leases: dict[str, int] = {}
        self._tokens = itertools.count(1)

    def unary_unary(self, path: str, **_: Any) -> Callable[[Any], Any]:
        handler = getattr(self, "_" + path.rpartition("/")[2])

        async def call(request: Any) -> Any:
            await asyncio.sleep(0)
            if self.away:
                raise Unavailable("DEPENDENCY_UNAVAILABLE", "the scheduler is away")
            return handler(request)

        return call

    def lose_all(self) -> None:
        self.leases.clear()

    def _CreateAllocation(self, request: allocations.CreateAllocationRequest) -> allocations.CreateAllocationResponse:
        token = self.leases.setdefault(request.owner, next(self._tokens))
        given = allocations.Allocation(lease_token=token, node="local-0", device_indices=[0], hardware_type="cpu")
        return allocations.CreateAllocationResponse(allocation=given)

    def _RenewAllocation(self, request: allocations.RenewAllocationRequest) -> allocations.RenewAllocationResponse:
        if self.leases.get(request.owner) != request.lease_token:
            raise Aborted("LEASE_STALE", "the allocation is another's now")
        return allocations.RenewAllocationResponse()

    def _ReleaseAllocation(
        self, request: allocations.ReleaseAllocationRequest
    ) -> allocations.ReleaseAllocationResponse:
        if self.leases.get(request.owner) == request.lease_token:
            del self.leases[request.owner]
        return allocations.ReleaseAllocationResponse()


class FakeServing:
    """Engines of one process: they start at once and die when a test says so."""

    def __init__(self) -> None:
        self.running: set[str] = set()

    async def warm_up(self, target: Target) -> None:
        self.running.add(target.engine.owner)

    async def drop(self, target: Target) -> None:
        self.running.discard(target.engine.owner)

    def is_running(self, target: Target) -> bool:
        return target.engine.owner in self.running


class EndpointWorld:
    """One process of inference as far as endpoints go; `restart` is another one on the same database."""

    def __init__(self, pool: Pool, settings: InferenceSettings) -> None:
        self.pool = pool
        self.settings = settings
        self.clock = SteppedClock()
        self.scheduler = FakeScheduler()
        self.outbox = Outbox(settings, clock=self.clock, ids=SystemIds())
        self.transitions = Transitions(self.outbox, self.clock)
        self.restart()

    def restart(self) -> None:
        """The process ends with all its engines, and a new one begins."""
        self.serving = FakeServing()
        self.reconciler = EndpointReconciler(
            self.pool,
            self.outbox,
            self.transitions,
            Router(self.pool),
            self.serving,  # type: ignore[arg-type]
            SpendGuard(self.pool, poll_s=1, clock=self.clock),
            self.scheduler,  # type: ignore[arg-type]
            settings=self.settings,
            clock=self.clock,
        )

    async def create(self, model: str = BASE) -> str:
        """A new endpoint; returns its id."""
        id = f"ep_{next(_numbers)}"
        endpoint = Endpoint(
            id=id,
            project_id=PROJECT,
            organization_id="org",
            endpoint_id=f"demo/{id}",
            model=model,
            hardware_type="",
            gpu_count=1,
            state=EndpointState.PENDING,
            status_message="",
            lease_token=None,
            device_indices=(),
            ready_at=None,
            stopped_at=None,
            created_at=self.clock.now(),
            billed_minutes=0,
            paid_until=None,
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

    async def reaches(self, id: str, state: EndpointState) -> Endpoint:
        """Looks until the endpoint is in that state; time stands still."""
        for _ in range(ROUNDS_MAX):
            if (found := await self.get(id)).state == state:
                return found
            await self.reconciler.look()
            await asyncio.sleep(0)
        raise AssertionError(f"the endpoint is {found.state}: {found.status_message}")

    async def pass_time(self, seconds: float, *, step_s: float = 1.0) -> None:
        """Looks every `step_s` for that long."""
        for _ in range(round(seconds / step_s)):
            await self.clock.advance(step_s)
            await self.reconciler.look()

    async def minutes(self, id: str) -> list[usage_events_pb2.EndpointMinuteRecorded]:
        """What billing will hear of the endpoint."""
        rows = await self.pool.fetch("SELECT payload FROM outbox WHERE subject = 'usage.endpoint.minute_recorded'")
        events = [usage_events_pb2.EndpointMinuteRecorded.FromString(row["payload"]) for row in rows]
        return [event for event in events if event.endpoint.endswith(f"/{id}")]


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
