"""finemesh.allocations.v1.AllocationService: devices for serving, under the same policy and constraint as training."""

from datetime import timedelta

import asyncpg

from chassis.db.pool import Connection
from chassis.errors import Aborted, FieldViolation, InvalidArgument, ResourceExhausted
from chassis.names import parse_name
from finemesh.allocations.v1 import allocation_service_pb2, allocation_service_pb2_grpc
from finemesh.endpoints.v1 import endpoint_pb2
from services.scheduler import lease_store, leases, policy
from services.scheduler.config import SchedulerSettings
from services.scheduler.convert import allocation_to
from services.scheduler.domain import AllocationKind
from services.scheduler.node_store import Fleet, load_fleet
from services.scheduler.spec import GPU_COUNT_MAX
from services.scheduler.store import QUEUE_TOPIC, Store, notify

# Somebody else was faster this many times in a row: the caller asks again later anyway.
RACES_MAX = 5
_pb = allocation_service_pb2


class AllocationService(allocation_service_pb2_grpc.AllocationServiceServicer):
    def __init__(self, store: Store, settings: SchedulerSettings) -> None:
        self._store = store
        self._settings = settings

    async def CreateAllocation(
        self, request: _pb.CreateAllocationRequest, context: object
    ) -> _pb.CreateAllocationResponse:
        need = _need(request)
        for _ in range(RACES_MAX):
            current = await lease_store.get_allocation(self._store.pool, need.owner)
            if current is not None:
                return _pb.CreateAllocationResponse(allocation=allocation_to(current))
            fleet = await self._load_fleet()
            problem = policy.too_large(need, fleet.groups)
            if problem is not None:
                raise ResourceExhausted(
                    "CAPACITY_EXHAUSTED",
                    f"no registered node could ever give {problem.requested}; the largest has {problem.largest}",
                    metadata={"requested": problem.requested, "largest": problem.largest},
                )
            group = policy.choose(need, fleet.groups)
            if group is None:
                return _pb.CreateAllocationResponse(waiting_for=policy.waiting_for(need, fleet.groups, 1))
            await self._take(need, group, fleet)
        return _pb.CreateAllocationResponse(waiting_for=f"{need.count} GPUs; others were faster")

    async def RenewAllocation(
        self, request: _pb.RenewAllocationRequest, context: object
    ) -> _pb.RenewAllocationResponse:
        expires_at = leases.expiry(self._store.now(), self._settings.lease_duration_s)
        async with self._store.writing() as connection:
            renewed = await lease_store.renew_allocation(connection, request.owner, request.lease_token, expires_at)
            current = await lease_store.get_allocation(connection, request.owner) if renewed else None
        if current is None:
            raise Aborted(
                "LEASE_STALE", f"allocation {request.lease_token} is not in force any more; stop serving on it"
            )
        return _pb.RenewAllocationResponse(allocation=allocation_to(current))

    async def ReleaseAllocation(
        self, request: _pb.ReleaseAllocationRequest, context: object
    ) -> _pb.ReleaseAllocationResponse:
        async with self._store.writing() as connection:
            if await lease_store.release(connection, request.lease_token, request.owner, self._store.now()):
                await notify(connection, QUEUE_TOPIC)
        return _pb.ReleaseAllocationResponse()

    async def _load_fleet(self) -> Fleet:
        seen_since = self._store.now() - timedelta(seconds=self._settings.node_memory_s)
        return await load_fleet(self._store.pool, seen_since, self._settings.nodes_max)

    async def _take(self, need: policy.Need, group: policy.DeviceGroup, fleet: Fleet) -> None:
        placement = policy.Placement(
            owner=need.owner,
            node=group.node,
            hardware_type=group.hardware_type,
            device_indices=tuple(sorted(group.free)[: need.count]),
        )
        try:
            async with self._store.writing() as connection:
                await self._insert(connection, placement, fleet.incarnations[group.node])
        except asyncpg.UniqueViolationError:
            # The snapshot is old: a device, or this owner, was served meanwhile. The next round sees it.
            return

    async def _insert(self, connection: Connection, placement: policy.Placement, incarnation: str) -> None:
        if not await lease_store.guard_node(connection, placement.node, incarnation):
            return
        now = self._store.now()
        token = await lease_store.next_lease_token(connection)
        expires_at = leases.expiry(now, self._settings.lease_duration_s)
        await lease_store.insert_allocation(
            connection, token, AllocationKind.SERVING, placement, incarnation, now, expires_at
        )


def _need(request: _pb.CreateAllocationRequest) -> policy.Need:
    parse_name(endpoint_pb2.Endpoint, request.owner, "owner")
    count = request.device_count or 1
    if not 1 <= count <= GPU_COUNT_MAX:
        description = f"must be 1 to {GPU_COUNT_MAX}; got {request.device_count}"
        raise InvalidArgument(
            "INVALID_FIELD",
            f"device_count {description}",
            violations=[FieldViolation("device_count", description)],
        )
    return policy.Need(owner=request.owner, count=count, hardware_type=request.hardware_type)
