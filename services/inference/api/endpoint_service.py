"""Handlers of finemesh.endpoints.v1.EndpointService: check, convert, call, convert."""

from __future__ import annotations

import re

from chassis.clock import Clock
from chassis.db.pool import Connection, Pool, transaction
from chassis.errors import FailedPrecondition, FieldViolation, NotFound, refuse_invalid
from chassis.identity import current_caller
from chassis.names import own_name, own_parent
from chassis.paging import Pages
from finemesh.endpoints.v1 import endpoint_pb2, endpoint_service_pb2, endpoint_service_pb2_grpc
from finemesh.identity.v1 import identity_pb2
from services.inference.api import convert
from services.inference.api.pages import own_page
from services.inference.endpoints.creation import Creation
from services.inference.endpoints.domain import Endpoint
from services.inference.endpoints.lifecycle import EndpointEvent
from services.inference.endpoints.reconciler import EndpointReconciler
from services.inference.endpoints.store import EndpointStore
from services.inference.endpoints.transitions import Transitions
from services.inference.models.domain import NameKind
from services.inference.models.store import ModelStore
from services.inference.spending.first_minutes import FirstMinutes
from services.inference.spending.spend_guard import SpendGuard

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
REQUEST_ID_CHARS_MAX = 128
GPU_COUNT_MAX = 64


class EndpointService(endpoint_service_pb2_grpc.EndpointServiceServicer):
    """Dedicated endpoints: create, start, stop, delete."""

    def __init__(
        self,
        pool: Pool,
        creation: Creation,
        transitions: Transitions,
        reconciler: EndpointReconciler,
        spend_guard: SpendGuard,
        first_minutes: FirstMinutes,
        pages: Pages,
        *,
        clock: Clock,
    ) -> None:
        self._pool = pool
        self._pages = pages
        self._creation = creation
        self._transitions = transitions
        self._reconciler = reconciler
        self._spend_guard = spend_guard
        self._first_minutes = first_minutes
        self._clock = clock

    async def CreateEndpoint(
        self, request: endpoint_service_pb2.CreateEndpointRequest, context: object
    ) -> endpoint_service_pb2.CreateEndpointResponse:
        caller = current_caller()
        own_parent(identity_pb2.Project, request.parent, caller)
        check(request)
        endpoint = await self._creation.create(caller, convert.wanted_endpoint_from_proto(request))
        self._reconciler.wake()
        return endpoint_service_pb2.CreateEndpointResponse(endpoint=convert.endpoint_to_proto(endpoint))

    async def GetEndpoint(
        self, request: endpoint_service_pb2.GetEndpointRequest, context: object
    ) -> endpoint_service_pb2.GetEndpointResponse:
        async with self._pool.acquire() as connection:
            found = await self._find(connection, request.name)
        return endpoint_service_pb2.GetEndpointResponse(endpoint=convert.endpoint_to_proto(found))

    async def ListEndpoints(
        self, request: endpoint_service_pb2.ListEndpointsRequest, context: object
    ) -> endpoint_service_pb2.ListEndpointsResponse:
        shown, token = await own_page(
            self._pool,
            self._pages,
            request,
            "endpoints",
            lambda connection, *wanted: EndpointStore(connection).page(*wanted),
        )
        return endpoint_service_pb2.ListEndpointsResponse(
            endpoints=[convert.endpoint_to_proto(endpoint) for endpoint in shown], next_page_token=token
        )

    async def StartEndpoint(
        self, request: endpoint_service_pb2.StartEndpointRequest, context: object
    ) -> endpoint_service_pb2.StartEndpointResponse:
        self._spend_guard.check(current_caller())
        async with self._pool.acquire() as connection:
            found = await self._find(connection, request.name)
        await self._first_minutes.require(
            organization_id=found.organization_id,
            project_id=found.project_id,
            hardware_type=found.hardware_type,
            device_count=found.gpu_count,
        )
        moved = await self._move(request.name, EndpointEvent.START)
        return endpoint_service_pb2.StartEndpointResponse(endpoint=convert.endpoint_to_proto(moved))

    async def StopEndpoint(
        self, request: endpoint_service_pb2.StopEndpointRequest, context: object
    ) -> endpoint_service_pb2.StopEndpointResponse:
        moved = await self._move(request.name, EndpointEvent.STOP)
        return endpoint_service_pb2.StopEndpointResponse(endpoint=convert.endpoint_to_proto(moved))

    async def DeleteEndpoint(
        self, request: endpoint_service_pb2.DeleteEndpointRequest, context: object
    ) -> endpoint_service_pb2.DeleteEndpointResponse:
        async with transaction(self._pool) as connection:
            found = await self._find(connection, request.name)
            if not await EndpointStore(connection).delete(found.project_id, found.id, self._clock.now()):
                raise FailedPrecondition("STATE_CONFLICT", f"the endpoint is {found.state}; stop it before deleting it")
            await ModelStore(connection).free_name(found.endpoint_id, NameKind.ENDPOINT, owner=found.id)
        return endpoint_service_pb2.DeleteEndpointResponse()

    async def _find(self, connection: Connection, name: str) -> Endpoint:
        parts = own_name(endpoint_pb2.Endpoint, name, current_caller())
        found = await EndpointStore(connection).find(parts["project"], id=parts["endpoint"])
        if found is None:
            raise NotFound("NOT_FOUND", f"no endpoint {name} in this project", metadata={"name": name})
        return found

    async def _move(self, name: str, event: EndpointEvent) -> Endpoint:
        """The transition that the caller asked for; STATE_CONFLICT when the state does not allow it."""
        async with transaction(self._pool) as connection:
            found = await self._find(connection, name)
            moved = await self._transitions.move(connection, found, event)
            if moved is None:
                raise FailedPrecondition("STATE_CONFLICT", f"cannot {event} an endpoint that is {found.state}")
        self._reconciler.wake()
        return moved


def check(request: endpoint_service_pb2.CreateEndpointRequest) -> None:
    """All faulty fields of a new endpoint at once."""
    violations = []
    if not NAME.fullmatch(request.endpoint_name):
        problem = "must be 1 to 63 lower-case letters, digits, '-', '_' or '.', starting with a letter or digit"
        violations.append(FieldViolation("endpoint_name", problem))
    if not request.model:
        violations.append(FieldViolation("model", "must name a base model or a tuned model"))
    if not 0 <= request.gpu_count <= GPU_COUNT_MAX:
        violations.append(FieldViolation("gpu_count", f"must be 0 (for 1) to {GPU_COUNT_MAX}"))
    if len(request.hardware_type) > 64:
        violations.append(FieldViolation("hardware_type", "must have at most 64 characters"))
    if len(request.request_id) > REQUEST_ID_CHARS_MAX:
        violations.append(FieldViolation("request_id", f"must have at most {REQUEST_ID_CHARS_MAX} characters"))
    refuse_invalid(violations)
