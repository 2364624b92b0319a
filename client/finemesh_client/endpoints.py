"""Dedicated endpoints: create, start, stop, delete. It knows no engine."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import cast

from finemesh.endpoints.v1 import endpoint_pb2, endpoint_service_pb2, endpoint_service_pb2_grpc
from finemesh_client.transport import Transport


class Endpoints:
    """Dedicated endpoints of the caller's project."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._stub = endpoint_service_pb2_grpc.EndpointServiceStub(transport.channel)

    async def create(
        self,
        endpoint_name: str,
        model: str,
        *,
        hardware_type: str = "",
        gpu_count: int = 0,
        request_id: str | None = None,
    ) -> endpoint_pb2.Endpoint:
        """Creates an endpoint and starts it; returns at once."""
        request = endpoint_service_pb2.CreateEndpointRequest(
            endpoint_name=endpoint_name,
            model=model,
            hardware_type=hardware_type,
            gpu_count=gpu_count,
            request_id=request_id or uuid.uuid4().hex,
        )
        answer = await self._transport.unary(self._stub.CreateEndpoint, request, safe=True)
        return cast(endpoint_pb2.Endpoint, answer.endpoint)

    async def get(self, name: str) -> endpoint_pb2.Endpoint:
        """One endpoint."""
        request = endpoint_service_pb2.GetEndpointRequest(name=name)
        answer = await self._transport.unary(self._stub.GetEndpoint, request, safe=True)
        return cast(endpoint_pb2.Endpoint, answer.endpoint)

    def list(self, limit: int | None = None) -> AsyncIterator[endpoint_pb2.Endpoint]:
        """The project's endpoints, newest first."""
        return self._transport.pages(
            self._stub.ListEndpoints, endpoint_service_pb2.ListEndpointsRequest(), "endpoints", limit
        )

    async def start(self, name: str) -> endpoint_pb2.Endpoint:
        """Starts a stopped endpoint; returns at once."""
        request = endpoint_service_pb2.StartEndpointRequest(name=name)
        answer = await self._transport.unary(self._stub.StartEndpoint, request, safe=True)
        return cast(endpoint_pb2.Endpoint, answer.endpoint)

    async def stop(self, name: str) -> endpoint_pb2.Endpoint:
        """Stops an endpoint; returns at once."""
        request = endpoint_service_pb2.StopEndpointRequest(name=name)
        answer = await self._transport.unary(self._stub.StopEndpoint, request, safe=True)
        return cast(endpoint_pb2.Endpoint, answer.endpoint)

    async def delete(self, name: str) -> None:
        """Deletes a stopped endpoint."""
        request = endpoint_service_pb2.DeleteEndpointRequest(name=name)
        await self._transport.unary(self._stub.DeleteEndpoint, request, safe=True)
