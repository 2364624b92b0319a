"""The internal OrganizationService: whether an organization exists, for services that are told its name."""

from typing import Any

from chassis.db.pool import Pool
from chassis.errors import NotFound
from chassis.names import parse_name
from finemesh.identity.v1 import identity_pb2
from finemesh.organizations.v1 import organization_service_pb2, organization_service_pb2_grpc
from services.gateway.identity.store import IdentityStore


class OrganizationService(organization_service_pb2_grpc.OrganizationServiceServicer):
    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def FindOrganization(
        self, request: organization_service_pb2.FindOrganizationRequest, context: Any
    ) -> organization_service_pb2.FindOrganizationResponse:
        organization_id = parse_name(identity_pb2.Organization, request.name)["organization"]
        async with self._pool.acquire() as connection:
            organization = await IdentityStore(connection).organization(organization_id)
        if organization is None:
            raise NotFound(
                "NOT_FOUND",
                f"there is no organization {request.name}; `finemesh whoami` with one of its keys tells its name",
                metadata={"name": request.name},
            )
        return organization_service_pb2.FindOrganizationResponse()
