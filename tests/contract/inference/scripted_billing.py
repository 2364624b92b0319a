"""Billing as inference sees it: it leases as much as a test says, to whoever asks."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf.duration_pb2 import Duration

from chassis.errors import FailedPrecondition, InvalidArgument, Unavailable
from chassis.process import Process
from chassis.rpc.server import ServerBuilder
from chassis.settings import ChassisSettings
from finemesh.credit.v1 import credit_lease_service_pb2 as pb
from finemesh.credit.v1 import credit_lease_service_pb2_grpc
from tests.harness.living import living

INPUT_NANOS_USD, OUTPUT_NANOS_USD, MINUTE_NANOS_USD = 50, 100, 1_000_000
PLENTY = 10**15


@dataclass
class ScriptedBilling(credit_lease_service_pb2_grpc.CreditLeaseServiceServicer):
    """`credit` is what an organization has beside what is leased; others have plenty."""

    credit: dict[str, int] = field(default_factory=dict)
    # A lease's organization and its total.
    leases: dict[str, tuple[str, int]] = field(default_factory=dict)
    away: bool = False
    lifetime_s: float = 60.0
    unpriced: set[str] = field(default_factory=set)
    free: set[str] = field(default_factory=set)
    recalled: list[str] = field(default_factory=list)
    grants: int = 0
    renewals: int = 0

    async def GetTokenPrice(self, request: pb.GetTokenPriceRequest, context: object) -> pb.GetTokenPriceResponse:
        self._look()
        if request.base_model in self.unpriced:
            raise InvalidArgument("PRICE_UNKNOWN", f"no price for {request.base_model}")
        if request.base_model in self.free:
            return pb.GetTokenPriceResponse(valid_duration=Duration(seconds=1800))
        return pb.GetTokenPriceResponse(
            input_nanos_usd_per_million=INPUT_NANOS_USD * 10**6,
            output_nanos_usd_per_million=OUTPUT_NANOS_USD * 10**6,
            valid_duration=Duration(seconds=1800),
        )

    async def GrantCredit(self, request: pb.GrantCreditRequest, context: object) -> pb.GrantCreditResponse:
        self._look()
        self.grants += 1
        _, before = self.leases.get(request.lease_id, ("", 0))
        room = self.credit.get(request.organization_id, PLENTY)
        required = max(0, request.required_nanos_usd - before)
        if required > room:
            raise _insufficient(required, room)
        ahead = min(request.wanted_nanos_usd - before, room // 8)
        grown = max(required, min(request.needed_nanos_usd - before, room), ahead)
        self.credit[request.organization_id] = room - grown
        self.leases[request.lease_id] = (request.organization_id, before + grown)
        return pb.GrantCreditResponse(granted_nanos_usd=before + grown)

    async def CheckEndpointMinutes(
        self, request: pb.CheckEndpointMinutesRequest, context: object
    ) -> pb.CheckEndpointMinutesResponse:
        self._look()
        required = request.minutes * request.device_count * MINUTE_NANOS_USD
        room = self.credit.get(request.organization_id, PLENTY)
        if required > room:
            raise _insufficient(required, room)
        return pb.CheckEndpointMinutesResponse(required_nanos_usd=required)

    async def RenewCreditLeases(
        self, request: pb.RenewCreditLeasesRequest, context: object
    ) -> pb.RenewCreditLeasesResponse:
        self._look()
        for each in request.returns:
            organization_id, before = self.leases.get(each.lease_id, ("", 0))
            self.credit[organization_id] = self.credit.get(organization_id, 0) + max(0, before - each.granted_nanos_usd)
            self.leases[each.lease_id] = (organization_id, min(before, each.granted_nanos_usd))
        self.renewals += 1
        recalled, self.recalled = self.recalled, []
        lifetime = Duration()
        lifetime.FromMilliseconds(int(self.lifetime_s * 1000))
        return pb.RenewCreditLeasesResponse(known=True, lease_duration=lifetime, recalled_lease_ids=recalled)

    def _look(self) -> None:
        if self.away:
            raise Unavailable("DEPENDENCY_UNAVAILABLE", "billing is away")


def _insufficient(required: int, room: int) -> FailedPrecondition:
    told = {"required": required, "available": room, "shortfall": required - room}
    metadata = {f"{name}_nanos_usd": str(amount) for name, amount in told.items()}
    return FailedPrecondition("BALANCE_INSUFFICIENT", "not enough", metadata=metadata)


@asynccontextmanager
async def running_billing(billing: ScriptedBilling, root: Path, tls_dir: Path) -> AsyncIterator[str]:
    """Its address."""
    settings = ChassisSettings(service_name="billing", port_file=root / "billing.port", tls_dir=tls_dir)

    async def wire(process: Process) -> None:
        server = ServerBuilder(process, settings)
        server.add(
            credit_lease_service_pb2_grpc.add_CreditLeaseServiceServicer_to_server,
            billing,
            "finemesh.credit.v1.CreditLeaseService",
            {"inference"},
        )
        await server.start()

    async with living(settings, wire):
        yield f"127.0.0.1:{(root / 'billing.port').read_text()}"
