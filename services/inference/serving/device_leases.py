"""Asks the scheduler for devices of this process's node, keeps them and gives them back. Not pure: gRPC.

It knows no endpoint and no engine: an owner is a name, and who has devices says itself how long it wants them.
"""

from __future__ import annotations

from dataclasses import dataclass

import grpc

from chassis.clock import Clock
from chassis.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied
from finemesh.allocations.v1 import allocation_service_pb2, allocation_service_pb2_grpc
from services.inference.config import InferenceSettings


@dataclass(frozen=True, kw_only=True)
class Devices:
    """Devices of one node that are an owner's under this token, until the lease is lost or given back."""

    lease_token: int
    node: str
    indices: tuple[int, ...]
    hardware_type: str


class DeviceLeases:
    """The scheduler's books as one process of inference sees them. Errors are the scheduler's, typed."""

    def __init__(self, scheduler: grpc.aio.Channel, *, settings: InferenceSettings, clock: Clock) -> None:
        self._stub = allocation_service_pb2_grpc.AllocationServiceStub(scheduler)
        self._settings = settings
        self._clock = clock

    async def ask(self, owner: str, *, hardware_type: str, count: int) -> Devices | str:
        """The owner's devices on this node, or what it waits for, in words. Those that it has already are not renewed
        by that. ResourceExhausted for what no node could ever give."""
        node = self._settings.node_name
        request = allocation_service_pb2.CreateAllocationRequest(
            owner=owner, hardware_type=hardware_type, device_count=count, node=node
        )
        try:
            answer = await self._stub.CreateAllocation(request, timeout=self._settings.scheduler_deadline_s)
        except PermissionDenied as error:
            if error.reason != "NODE_NOT_CERTIFIED":
                raise
            return f"inference to have the certificate of its own node: {error.message}"
        except NotFound as error:
            return f"the scheduler to know this node: {error.message}"
        except FailedPrecondition as error:
            return f"a process of inference on another node: {error.message}"
        except InvalidArgument as error:
            if [violation.field for violation in error.violations] != ["node"]:
                raise
            return f"FINEMESH_INFERENCE_NODE_NAME to be set where inference runs: {error.message}"
        if not answer.HasField("allocation"):
            return str(answer.waiting_for)
        given = answer.allocation
        if node and given.node != node:
            return f"the process on {given.node} that took devices for it"
        return Devices(
            lease_token=given.lease_token,
            node=given.node,
            indices=tuple(given.device_indices),
            hardware_type=given.hardware_type,
        )

    async def renew(self, owner: str, lease_token: int) -> float:
        """Until when the devices are certainly the owner's, by the monotonic clock: a margin less than the lease lasts
        from the moment at which the renewal was sent. Aborted or NotFound when they are somebody else's now."""
        request = allocation_service_pb2.RenewAllocationRequest(owner=owner, lease_token=lease_token)
        sent_s = self._clock.monotonic()
        answer = await self._stub.RenewAllocation(request, timeout=self._settings.scheduler_deadline_s)
        lease_s = answer.allocation.lease_duration.ToMilliseconds() / 1000
        if lease_s <= self._settings.device_margin_s:
            raise FailedPrecondition(
                "STATE_CONFLICT",
                f"the scheduler's leases last {lease_s:g} s, and device_margin_s is {self._settings.device_margin_s:g}:"
                " no engine could serve on them; set it lower",
            )
        return sent_s + lease_s - self._settings.device_margin_s

    async def give_back(self, owner: str, lease_token: int) -> None:
        """Also devices that are gone already."""
        request = allocation_service_pb2.ReleaseAllocationRequest(owner=owner, lease_token=lease_token)
        await self._stub.ReleaseAllocation(request, timeout=self._settings.scheduler_deadline_s)
