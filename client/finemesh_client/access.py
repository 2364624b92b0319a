"""Who the caller is, and its projects and API keys. A key's secret is shown once."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Sequence
from typing import cast

from finemesh.identity.v1 import identity_pb2, identity_service_pb2, identity_service_pb2_grpc
from finemesh_client.transport import Transport


class Identity:
    """Organization, projects and keys of the caller."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._stub = identity_service_pb2_grpc.IdentityServiceStub(transport.channel)

    async def caller(self) -> identity_service_pb2.GetCallerResponse:
        """Organization, project and key of the caller."""
        request = identity_service_pb2.GetCallerRequest()
        answer = await self._transport.unary(self._stub.GetCaller, request, safe=True)
        return cast(identity_service_pb2.GetCallerResponse, answer)

    async def create_project(self, slug: str, display_name: str = "") -> identity_pb2.Project:
        """Creates a project. Needs the admin role."""
        request = identity_service_pb2.CreateProjectRequest(
            slug=slug, display_name=display_name, request_id=uuid.uuid4().hex
        )
        answer = await self._transport.unary(self._stub.CreateProject, request, safe=True)
        return cast(identity_pb2.Project, answer.project)

    async def create_key(
        self, display_name: str, roles: Sequence[identity_pb2.Role.ValueType] = (), *, project: str = ""
    ) -> identity_service_pb2.CreateApiKeyResponse:
        """Creates a key; its secret is in this answer only, so a lost answer needs a new key."""
        request = identity_service_pb2.CreateApiKeyRequest(parent=project, display_name=display_name, roles=roles)
        answer = await self._transport.unary(self._stub.CreateApiKey, request, safe=False)
        return cast(identity_service_pb2.CreateApiKeyResponse, answer)

    def list_keys(self, project: str = "", limit: int | None = None) -> AsyncIterator[identity_pb2.ApiKey]:
        """The project's keys, newest first."""
        return self._transport.pages(
            self._stub.ListApiKeys, identity_service_pb2.ListApiKeysRequest(parent=project), "keys", limit
        )

    async def revoke_key(self, name: str) -> identity_pb2.ApiKey:
        """Revokes a key."""
        request = identity_service_pb2.RevokeApiKeyRequest(name=name)
        return cast(identity_pb2.ApiKey, (await self._transport.unary(self._stub.RevokeApiKey, request, safe=True)).key)
