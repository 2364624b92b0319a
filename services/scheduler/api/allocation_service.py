"""finemesh.allocations.v1.AllocationService: devices for serving. Handlers check, convert, call and answer."""

import re

from chassis.errors import invalid
from chassis.identity import current_caller
from chassis.names import parse_name
from finemesh.allocations.v1 import allocation_service_pb2, allocation_service_pb2_grpc
from finemesh.endpoints.v1 import endpoint_pb2
from services.scheduler.api.convert import allocation_to_proto
from services.scheduler.config import SchedulerSettings
from services.scheduler.placement.allocation import AllocationRecord
from services.scheduler.placement.lease_holders import LeaseHolders, require_node
from services.scheduler.placement.policy import Need
from services.scheduler.placement.serving import ServingAllocations
from services.scheduler.spec.tuning_spec import GPU_COUNT_MAX

_pb = allocation_service_pb2
# An engine that serves everybody has no resource of its own, so no contract names it.
ENGINE_OWNER = re.compile(r"nodes/[a-z0-9][a-z0-9-]{0,62}/engines/[A-Za-z0-9._-]{1,128}")


class AllocationService(allocation_service_pb2_grpc.AllocationServiceServicer):
    def __init__(self, allocations: ServingAllocations, holders: LeaseHolders, settings: SchedulerSettings) -> None:
        self._allocations = allocations
        self._holders = holders
        self._lease_duration_s = settings.lease_duration_s

    async def CreateAllocation(
        self, request: _pb.CreateAllocationRequest, context: object
    ) -> _pb.CreateAllocationResponse:
        if _speaks_for_a_node():
            require_node(request.node)
        answer = await self._allocations.create(_need(request))
        if isinstance(answer, str):
            return _pb.CreateAllocationResponse(waiting_for=answer)
        return _pb.CreateAllocationResponse(allocation=self._to_proto(answer))

    async def RenewAllocation(
        self, request: _pb.RenewAllocationRequest, context: object
    ) -> _pb.RenewAllocationResponse:
        await self._require_holder(request.lease_token)
        current = await self._allocations.renew(request.owner, request.lease_token)
        return _pb.RenewAllocationResponse(allocation=self._to_proto(current))

    async def ReleaseAllocation(
        self, request: _pb.ReleaseAllocationRequest, context: object
    ) -> _pb.ReleaseAllocationResponse:
        await self._require_holder(request.lease_token)
        await self._allocations.release(request.owner, request.lease_token)
        return _pb.ReleaseAllocationResponse()

    async def _require_holder(self, lease_token: int) -> None:
        if _speaks_for_a_node():
            await self._holders.require(lease_token)

    def _to_proto(self, record: AllocationRecord) -> _pb.Allocation:
        return allocation_to_proto(record, lease_duration_s=self._lease_duration_s)


def _speaks_for_a_node() -> bool:
    """A certificate of inference may name a node; then it is for the devices of that node alone."""
    return bool(current_caller().instance)


def _need(request: _pb.CreateAllocationRequest) -> Need:
    if request.owner.startswith("nodes/"):
        if not ENGINE_OWNER.fullmatch(request.owner):
            raise invalid("owner", "must be nodes/{node}/engines/{engine}, or the name of an endpoint")
    else:
        parse_name(endpoint_pb2.Endpoint, request.owner, "owner")
    count = request.device_count or 1
    if not 1 <= count <= GPU_COUNT_MAX:
        raise invalid("device_count", f"must be 1 to {GPU_COUNT_MAX}; got {request.device_count}")
    return Need(owner=request.owner, count=count, hardware_type=request.hardware_type, node=request.node)
