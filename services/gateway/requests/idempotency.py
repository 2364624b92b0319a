"""Creates that may be repeated: what a request_id made before, or the claim to make it now. Not pure: database."""

from dataclasses import dataclass
from datetime import datetime

from chassis.db.pool import Connection
from chassis.errors import AlreadyExists, FieldViolation
from services.gateway.requests.store import RequestStore


@dataclass(frozen=True, kw_only=True)
class Request:
    """One create as its request_id identifies it; an empty `request_id` promises nothing."""

    project_id: str
    method: str
    request_id: str
    fingerprint: bytes


async def earlier(connection: Connection, request: Request) -> str | None:
    """Id of what this request made before, if it did; AlreadyExists when the id stood for another request."""
    if not request.request_id:
        return None
    repeated = await RequestStore(connection).repeated(request.project_id, request.method, request.request_id)
    if repeated is None:
        return None
    if repeated.fingerprint != request.fingerprint:
        raise AlreadyExists(
            "REQUEST_ID_REUSED",
            f"request_id {request.request_id} came before with a different request; use a new one",
            violations=[FieldViolation("request_id", "was used for a different request")],
        )
    return repeated.resource_id


async def claim(connection: Connection, request: Request, resource_id: str, now: datetime) -> bool:
    """False when another transaction made it first; `earlier` then says what."""
    if not request.request_id:
        return True
    return await RequestStore(connection).claim(
        project_id=request.project_id,
        method=request.method,
        request_id=request.request_id,
        fingerprint=request.fingerprint,
        resource_id=resource_id,
        now=now,
    )
