"""Handlers of finemesh.endpoints.v1.EndpointService: check, convert, call, convert. The keeper does the work."""

from __future__ import annotations

import hashlib
import re

from chassis.clock import Clock
from chassis.db.pool import Connection, Pool, transaction
from chassis.errors import (
    AlreadyExists,
    FailedPrecondition,
    FieldViolation,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)
from chassis.identity import Caller, current_caller
from chassis.ids import Ids
from chassis.names import own_name, own_parent
from chassis.paging import page_size
from finemesh.endpoints.v1 import endpoint_pb2, endpoint_service_pb2, endpoint_service_pb2_grpc
from finemesh.identity.v1 import identity_pb2
from services.inference import convert, store
from services.inference.catalogue import unknown
from services.inference.config import InferenceSettings
from services.inference.domain import Endpoint
from services.inference.endpoint_keeper import EndpointKeeper
from services.inference.lifecycle import EndpointEvent, EndpointState
from services.inference.model_service import read_cursor, write_cursor
from services.inference.purse import Purse

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
REQUEST_ID_CHARS_MAX = 128
GPU_COUNT_MAX = 64


class EndpointService(endpoint_service_pb2_grpc.EndpointServiceServicer):
    """Dedicated endpoints: create, start, stop, delete."""

    def __init__(
        self,
        *,
        pool: Pool,
        keeper: EndpointKeeper,
        purse: Purse,
        settings: InferenceSettings,
        clock: Clock,
        ids: Ids,
    ) -> None:
        self._pool = pool
        self._purse = purse
        self._keeper = keeper
        self._settings = settings
        self._clock = clock
        self._ids = ids

    async def CreateEndpoint(
        self, request: endpoint_service_pb2.CreateEndpointRequest, context: object
    ) -> endpoint_service_pb2.CreateEndpointResponse:
        caller = current_caller()
        own_parent(identity_pb2.Project, request.parent, caller)
        check(request)
        wanted = endpoint_service_pb2.CreateEndpointRequest()
        wanted.CopyFrom(request)
        wanted.request_id = ""
        fingerprint = hashlib.sha256(wanted.SerializeToString(deterministic=True)).hexdigest()
        async with transaction(self._pool) as connection:
            endpoint = await self._create(connection, caller, request, fingerprint)
        self._keeper.wake()
        return endpoint_service_pb2.CreateEndpointResponse(endpoint=convert.to_endpoint(endpoint))

    async def _create(
        self,
        connection: Connection,
        caller: Caller,
        request: endpoint_service_pb2.CreateEndpointRequest,
        fingerprint: str,
    ) -> Endpoint:
        if request.request_id:
            earlier = await store.find_request(connection, caller.tenant, request.request_id)
            if earlier is not None:
                return await self._repeated(connection, caller, earlier, fingerprint)
        self._purse.check(caller)
        base = await store.find_base_model(connection, request.model)
        if base is None and await store.find_model(connection, caller.tenant, model_id=request.model) is None:
            raise unknown(request.model)
        if await store.count_endpoints(connection, caller.tenant) >= self._settings.endpoints_max:
            raise ResourceExhausted("SIZE_LIMIT", f"a project has at most {self._settings.endpoints_max} endpoints")
        endpoint = Endpoint(
            id=self._ids.new("ep_"),
            project_id=caller.tenant,
            organization_id=caller.account,
            endpoint_id=f"{caller.namespace}/{request.endpoint_name}",
            model=request.model,
            hardware_type=request.hardware_type,
            gpu_count=request.gpu_count or 1,
            state=EndpointState.PENDING,
            status_message="",
            lease_token=None,
            device_indices=(),
            ready_at=None,
            stopped_at=None,
            created_at=self._clock.now(),
            billed_minutes=0,
            period_minutes=0,
        )
        taken = await store.find_model(connection, caller.tenant, model_id=endpoint.endpoint_id)
        added = taken is None and await store.add_endpoint(
            connection, endpoint, request_id=request.request_id or None, request_sha256=fingerprint
        )
        if not added:
            raise AlreadyExists("ALREADY_EXISTS", f"{endpoint.endpoint_id} is taken; choose another endpoint_name")
        await self._keeper.announce(connection, endpoint, from_state="")
        return endpoint

    @staticmethod
    async def _repeated(connection: Connection, caller: Caller, earlier: tuple[str, str], fingerprint: str) -> Endpoint:
        """The endpoint that the same request made before."""
        if earlier[1] != fingerprint:
            raise AlreadyExists("REQUEST_ID_REUSED", "this request_id came before with a different request")
        found = await store.find_endpoint(connection, caller.tenant, id=earlier[0])
        if found is None:
            raise NotFound("NOT_FOUND", "the endpoint that this request_id made was deleted")
        return found

    async def GetEndpoint(
        self, request: endpoint_service_pb2.GetEndpointRequest, context: object
    ) -> endpoint_service_pb2.GetEndpointResponse:
        async with self._pool.acquire() as connection:
            found = await self._find(connection, request.name)
        return endpoint_service_pb2.GetEndpointResponse(endpoint=convert.to_endpoint(found))

    async def ListEndpoints(
        self, request: endpoint_service_pb2.ListEndpointsRequest, context: object
    ) -> endpoint_service_pb2.ListEndpointsResponse:
        project_id = own_parent(identity_pb2.Project, request.parent, current_caller())["project"]
        scope, size = f"endpoints:{project_id}", page_size(request.page_size)
        async with self._pool.acquire() as connection:
            found = await store.list_endpoints(connection, project_id, read_cursor(request.page_token, scope), size)
        token = write_cursor(found[-1].created_at, found[-1].id, scope) if len(found) == size else ""
        return endpoint_service_pb2.ListEndpointsResponse(
            endpoints=[convert.to_endpoint(endpoint) for endpoint in found], next_page_token=token
        )

    async def StartEndpoint(
        self, request: endpoint_service_pb2.StartEndpointRequest, context: object
    ) -> endpoint_service_pb2.StartEndpointResponse:
        self._purse.check(current_caller())
        moved = await self._move(request.name, EndpointEvent.START)
        return endpoint_service_pb2.StartEndpointResponse(endpoint=convert.to_endpoint(moved))

    async def StopEndpoint(
        self, request: endpoint_service_pb2.StopEndpointRequest, context: object
    ) -> endpoint_service_pb2.StopEndpointResponse:
        moved = await self._move(request.name, EndpointEvent.STOP)
        return endpoint_service_pb2.StopEndpointResponse(endpoint=convert.to_endpoint(moved))

    async def DeleteEndpoint(
        self, request: endpoint_service_pb2.DeleteEndpointRequest, context: object
    ) -> endpoint_service_pb2.DeleteEndpointResponse:
        async with transaction(self._pool) as connection:
            found = await self._find(connection, request.name)
            if not await store.delete_endpoint(connection, found.project_id, found.id, self._clock.now()):
                raise FailedPrecondition("STATE_CONFLICT", f"the endpoint is {found.state}; stop it before deleting it")
        return endpoint_service_pb2.DeleteEndpointResponse()

    async def _find(self, connection: Connection, name: str) -> Endpoint:
        parts = own_name(endpoint_pb2.Endpoint, name, current_caller())
        found = await store.find_endpoint(connection, parts["project"], id=parts["endpoint"])
        if found is None:
            raise NotFound("NOT_FOUND", f"no endpoint {name} in this project", metadata={"name": name})
        return found

    async def _move(self, name: str, event: EndpointEvent) -> Endpoint:
        """The transition that the caller asked for; STATE_CONFLICT when the state does not allow it."""
        async with transaction(self._pool) as connection:
            found = await self._find(connection, name)
            moved = await self._keeper.move(connection, found, event)
            if moved is None:
                raise FailedPrecondition("STATE_CONFLICT", f"cannot {event} an endpoint that is {found.state}")
        self._keeper.wake()
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
    if violations:
        message = f"{violations[0].field} {violations[0].description}"
        raise InvalidArgument("INVALID_FIELD", message, violations=violations)
