"""Creates an endpoint for a caller, once per request id. Not pure: database, events."""

from __future__ import annotations

from dataclasses import dataclass

from chassis.clock import Clock
from chassis.db.pool import Connection, Pool, transaction
from chassis.errors import AlreadyExists, NotFound, ResourceExhausted
from chassis.identity import Caller
from chassis.ids import Ids
from services.inference.endpoints.domain import Endpoint, new_endpoint
from services.inference.endpoints.store import EndpointStore
from services.inference.endpoints.transitions import Transitions
from services.inference.models.domain import NameKind, name_taken, unknown_model
from services.inference.models.store import ModelStore
from services.inference.spending.first_minutes import FirstMinutes
from services.inference.spending.spend_guard import SpendGuard


@dataclass(frozen=True, kw_only=True)
class WantedEndpoint:
    """What a caller asks for; `fingerprint` is the same for the same request, whatever its `request_id`."""

    endpoint_name: str
    model: str
    hardware_type: str
    gpu_count: int
    request_id: str
    fingerprint: str


class Creation:
    """Checks that the caller may have the endpoint, then adds and announces it in one transaction."""

    def __init__(
        self,
        pool: Pool,
        transitions: Transitions,
        spend_guard: SpendGuard,
        first_minutes: FirstMinutes,
        *,
        endpoints_max: int,
        clock: Clock,
        ids: Ids,
    ) -> None:
        self._pool = pool
        self._transitions = transitions
        self._spend_guard = spend_guard
        self._first_minutes = first_minutes
        self._endpoints_max = endpoints_max
        self._clock = clock
        self._ids = ids

    async def create(self, caller: Caller, wanted: WantedEndpoint) -> Endpoint:
        """The new endpoint, or the one that the same request made before; a typed error says what is in its way."""
        async with self._pool.acquire() as connection:
            earlier = await _earlier(connection, caller, wanted)
        if earlier is not None:
            return earlier
        self._spend_guard.check(caller)
        await self._first_minutes.require(
            organization_id=caller.account,
            project_id=caller.tenant,
            hardware_type=wanted.hardware_type,
            device_count=max(1, wanted.gpu_count),
        )
        async with transaction(self._pool) as connection:
            # The same request may have come twice at once.
            earlier = await _earlier(connection, caller, wanted)
            if earlier is not None:
                return earlier
            await self._check_model_and_count(connection, caller, wanted.model)
            endpoint = self._endpoint(caller, wanted)
            named = await ModelStore(connection).claim_name(endpoint.endpoint_id, NameKind.ENDPOINT, owner=endpoint.id)
            if not named or not await EndpointStore(connection).add(
                endpoint, request_id=wanted.request_id or None, request_sha256=wanted.fingerprint
            ):
                raise name_taken(endpoint.endpoint_id, "endpoint_name")
            await self._transitions.announce(connection, endpoint, from_state="")
            return endpoint

    async def _check_model_and_count(self, connection: Connection, caller: Caller, model: str) -> None:
        models = ModelStore(connection)
        if await models.find_base(model) is None and await models.find(caller.tenant, model_id=model) is None:
            raise unknown_model(model)
        if await EndpointStore(connection).count(caller.tenant) >= self._endpoints_max:
            raise ResourceExhausted("SIZE_LIMIT", f"a project has at most {self._endpoints_max} endpoints")

    def _endpoint(self, caller: Caller, wanted: WantedEndpoint) -> Endpoint:
        return new_endpoint(
            id=self._ids.new("ep_"),
            project_id=caller.tenant,
            organization_id=caller.account,
            endpoint_id=f"{caller.namespace}/{wanted.endpoint_name}",
            model=wanted.model,
            hardware_type=wanted.hardware_type,
            gpu_count=wanted.gpu_count,
            created_at=self._clock.now(),
        )


async def _earlier(connection: Connection, caller: Caller, wanted: WantedEndpoint) -> Endpoint | None:
    """The endpoint that the same request made before."""
    earlier = None
    if wanted.request_id:
        earlier = await EndpointStore(connection).find_request(caller.tenant, wanted.request_id)
    if earlier is None:
        return None
    if earlier[1] != wanted.fingerprint:
        raise AlreadyExists("REQUEST_ID_REUSED", "this request_id came before with a different request")
    found = await EndpointStore(connection).find(caller.tenant, id=earlier[0])
    if found is None:
        raise NotFound("NOT_FOUND", "the endpoint that this request_id made was deleted")
    return found
