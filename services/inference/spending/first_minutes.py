"""Asks billing whether an organization can pay for the first minutes of an endpoint, before it starts. Not pure: gRPC.

Nothing is reserved: minutes are booked because they ran. It knows no endpoint, and neither prices nor caps.
"""

from __future__ import annotations

import grpc

from chassis.errors import Cancelled, DeadlineExceeded, Internal, Unavailable
from finemesh.credit.v1 import credit_lease_service_pb2 as pb
from finemesh.credit.v1 import credit_lease_service_pb2_grpc
from services.inference.config import InferenceSettings
from services.inference.spending.refusals import billing_away


class FirstMinutes:
    """So that no endpoint starts only to be parked when its first minute is booked."""

    def __init__(self, billing: grpc.aio.Channel, settings: InferenceSettings) -> None:
        self._billing = credit_lease_service_pb2_grpc.CreditLeaseServiceStub(billing)
        self._minutes_min = settings.endpoint_minutes_covered_min
        self._deadline_s = settings.credit_wait_s_max

    async def require(self, *, organization_id: str, project_id: str, hardware_type: str, device_count: int) -> None:
        """Returns when credit and caps cover them; a typed error says what lacks."""
        if not self._minutes_min:
            return
        request = pb.CheckEndpointMinutesRequest(
            organization_id=organization_id,
            project_id=project_id,
            hardware_type=hardware_type,
            device_count=device_count,
            minutes=self._minutes_min,
        )
        try:
            await self._billing.CheckEndpointMinutes(request, timeout=self._deadline_s)
        except (Unavailable, DeadlineExceeded, Cancelled, Internal) as error:
            raise billing_away(error.message) from error
