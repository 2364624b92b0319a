"""Reads and writes endpoints. It decides nothing: which transition is allowed comes from the caller."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from chassis.db.pool import Connection
from chassis.db.queries import affected, load_queries
from services.inference.endpoints.domain import Endpoint
from services.inference.endpoints.lifecycle import EndpointState
from services.inference.endpoints.minutes import DueMinutes
from services.inference.engines.answer_form import NO_PARSERS, AnswerParsers
from services.inference.models.domain import ModelKind, Weights
from services.inference.models.store import weights_of
from services.inference.serving.device_leases import Devices
from services.inference.serving.target import Target, base_target, tuned_target

ENDPOINT_FIELDS = tuple(field.name for field in dataclasses.fields(Endpoint))
QUERIES = load_queries(Path(__file__).parent / "queries.sql")


@dataclass(frozen=True, kw_only=True)
class ResolvedName:
    """A project's endpoint of a name, if it is one, with whether its owner's claim lasts; and what serves the model."""

    endpoint: Endpoint | None
    claimed: bool
    target: Target | None


class EndpointStore:
    """Endpoints over one connection, inside the caller's transaction if there is one."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def count(self, project_id: str) -> int:
        """Live endpoints of a project."""
        return int(await QUERIES.count_endpoints(self._connection, project_id=project_id))

    async def add(self, endpoint: Endpoint, *, request_id: str | None, request_sha256: str) -> bool:
        """Creates an endpoint; False when its request or its id exists already."""
        status = await QUERIES.add_endpoint(
            self._connection,
            id=endpoint.id,
            project_id=endpoint.project_id,
            organization_id=endpoint.organization_id,
            endpoint_id=endpoint.endpoint_id,
            model=endpoint.model,
            hardware_type=endpoint.hardware_type,
            gpu_count=endpoint.gpu_count,
            created_at=endpoint.created_at,
            request_id=request_id,
            request_sha256=request_sha256,
        )
        return affected(status) == 1

    async def find_request(self, project_id: str, request_id: str) -> tuple[str, str] | None:
        """(endpoint id, fingerprint of the request) of an earlier call with this request id."""
        row = await QUERIES.get_endpoint_request(self._connection, project_id=project_id, request_id=request_id)
        return (row["id"], row["request_sha256"]) if row else None

    async def find(self, project_id: str, *, id: str = "", endpoint_id: str = "") -> Endpoint | None:
        """A live endpoint of a project, by its id or by the id that chat calls use."""
        if id:
            row = await QUERIES.get_endpoint(self._connection, project_id=project_id, id=id)
        else:
            row = await QUERIES.get_endpoint_by_id(self._connection, project_id=project_id, endpoint_id=endpoint_id)
        return _endpoint_of(row) if row else None

    async def resolve(self, project_id: str, name: str) -> ResolvedName:
        """What a project means by a name."""
        row = await QUERIES.resolve_name(self._connection, project_id=project_id, name=name)
        endpoint = _endpoint_of({field: row[field] for field in ENDPOINT_FIELDS}) if row["id"] is not None else None
        return ResolvedName(endpoint=endpoint, claimed=row["claimed"], target=_target_of(row))

    async def page(self, project_id: str, before: tuple[datetime, str], page_size: int) -> list[Endpoint]:
        """Live endpoints of a project, newest first."""
        rows = QUERIES.list_endpoints(
            self._connection, project_id=project_id, before_time=before[0], before_id=before[1], page_size=page_size
        )
        return [_endpoint_of(row) async for row in rows]

    async def list_moving(
        self, owner: str, over_by: datetime | None, after: Endpoint | None, page_size: int
    ) -> list[Endpoint]:
        """Endpoints of all projects that this owner has to look after, oldest first, after a given one; with a time of
        the database also those whose claim was over by then."""
        rows = QUERIES.list_moving_endpoints(
            self._connection, owner=owner, over_by=over_by, **_place_of(after), page_size=page_size
        )
        return [_endpoint_of(row) async for row in rows]

    async def list_owned(self, owner: str) -> list[Endpoint]:
        """What an owner holds."""
        return [_endpoint_of(row) async for row in QUERIES.list_owned_endpoints(self._connection, owner=owner)]

    async def list_resumable(self, now: datetime, after: Endpoint | None, page_size: int) -> list[Endpoint]:
        """Parked endpoints for which somebody may spend again, oldest first, after a given one."""
        rows = QUERIES.list_resumable_endpoints(self._connection, now=now, **_place_of(after), page_size=page_size)
        return [_endpoint_of(row) async for row in rows]

    async def move(
        self,
        id: str,
        *,
        sources: Iterable[EndpointState],
        destination: EndpointState,
        status_message: str,
        lease_token: int | None = None,
        any_lease: bool = True,
        over_by: datetime | None = None,
        now: datetime,
    ) -> Endpoint | None:
        """The guarded transition; None when the endpoint is in none of the sources, not under this lease, or, where a
        time of the database is given, when its claim was not over by then."""
        row = await QUERIES.move_endpoint(
            self._connection,
            id=id,
            sources=[str(source) for source in sources],
            destination=str(destination),
            status_message=status_message,
            lease_token=lease_token,
            any_lease=any_lease,
            over_by=over_by,
            now=now,
        )
        return _endpoint_of(row) if row else None

    async def claim(
        self, id: str, devices: Devices, *, owner: str, owner_address: str, duration_s: float
    ) -> Endpoint | None:
        """Makes an endpoint that waits the owner's, with these devices; None when that is not to be."""
        row = await QUERIES.claim_endpoint(
            self._connection,
            id=id,
            lease_token=devices.lease_token,
            device_indices=list(devices.indices),
            hardware_type=devices.hardware_type,
            owner=owner,
            owner_address=owner_address,
            duration_s=duration_s,
        )
        return _endpoint_of(row) if row else None

    async def renew_claims(self, owner: str, duration_s: float) -> datetime:
        """Renews everything that an owner holds; the time of the database."""
        found: datetime = await QUERIES.renew_claims(self._connection, owner=owner, duration_s=duration_s)
        return found

    async def live_leases(self, ids: Iterable[str]) -> set[int]:
        """The lease tokens of those of these endpoints whose claims last."""
        return {row["lease_token"] async for row in QUERIES.list_live_leases(self._connection, ids=list(ids))}

    async def time(self) -> datetime:
        """That of the database, by which claims are written and judged."""
        found: datetime = await QUERIES.get_time(self._connection)
        return found

    async def set_status(self, id: str, status_message: str) -> None:
        """Says in words why an endpoint waits for devices."""
        await QUERIES.set_endpoint_status(self._connection, id=id, status_message=status_message)

    async def bill_minutes(self, endpoint: Endpoint, due: DueMinutes) -> bool:
        """Counts begun minutes; False when somebody else counted or the lease is another one."""
        status = await QUERIES.bill_minutes(
            self._connection,
            id=endpoint.id,
            lease_token=endpoint.lease_token,
            seen_minutes=endpoint.billed_minutes,
            minutes=due.count,
            paid_until=due.paid_until,
        )
        return affected(status) == 1

    async def delete(self, project_id: str, id: str, now: datetime) -> bool:
        """Deletes an endpoint that holds no devices; False when there is none."""
        return affected(await QUERIES.delete_endpoint(self._connection, project_id=project_id, id=id, now=now)) == 1

    async def prune(self, retention_s: float, batch_max: int) -> int:
        """Forgets endpoints that were deleted long ago, at most so many; returns how many."""
        return affected(await QUERIES.prune_endpoints(self._connection, retention_s=retention_s, batch_max=batch_max))


def _place_of(endpoint: Endpoint | None) -> dict[str, object]:
    """Where a page begins: behind this endpoint, or at the first one."""
    if endpoint is None:
        return {"after_time": datetime.min.replace(tzinfo=UTC), "after_id": ""}
    return {"after_time": endpoint.created_at, "after_id": endpoint.id}


def _endpoint_of(row: Any) -> Endpoint:
    return Endpoint(**{**dict(row), "device_indices": tuple(row["device_indices"])})


def _target_of(row: Any) -> Target | None:
    base, parsers = None, NO_PARSERS
    if row["base_model"] is not None:
        base = _weights_of(row, "base_")
        parsers = AnswerParsers(tool=row["tool_parser"], reasoning=row["reasoning_parser"])
    if row["tuned_kind"] is not None:
        return tuned_target(
            kind=ModelKind(row["tuned_kind"]),
            weights=_weights_of(row, "tuned_"),
            adapter_rank=row["tuned_adapter_rank"],
            base_model=row["tuned_base_model"],
            base_weights=base,
            parsers=parsers,
        )
    return base_target(row["base_model"], base, parsers) if base is not None else None


def _weights_of(row: Any, prefix: str) -> Weights:
    return weights_of({name: row[prefix + name] for name in ("revision", "artifact_key", "files")})
