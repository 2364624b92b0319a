"""Whether an organization exists that somebody names: the gateway knows. Not pure: gRPC."""

from typing import TYPE_CHECKING

from chassis.identity import Caller
from chassis.names import format_name
from finemesh.identity.v1 import identity_pb2
from finemesh.organizations.v1 import organization_service_pb2

if TYPE_CHECKING:
    from finemesh.organizations.v1.organization_service_pb2_grpc import OrganizationServiceAsyncStub


class Organizations:
    """Asked before anything is booked for an organization that an operator named. Events need no such question: they
    come from services that had the organization from a key."""

    def __init__(self, gateway: "OrganizationServiceAsyncStub") -> None:
        self._gateway = gateway

    async def require(self, organization_id: str, caller: Caller) -> None:
        """NotFound when there is none; the caller's own exists, because its key does."""
        if organization_id == caller.account:
            return
        name = format_name(identity_pb2.Organization, organization=organization_id)
        await self._gateway.FindOrganization(organization_service_pb2.FindOrganizationRequest(name=name))
