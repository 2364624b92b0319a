"""Reads and writes inference's tables. It takes a connection, returns domain objects and decides nothing."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from chassis.db.pool import Connection
from chassis.db.queries import affected, load_queries
from services.inference.domain import BaseModel, Endpoint, ModelKind, StoredFile, TunedModel, Weights
from services.inference.lifecycle import EndpointState
from services.inference.spending import CapWord, CreditWord

QUERIES = load_queries(Path(__file__).parent / "queries.sql")
MIGRATIONS = Path(__file__).parent / "migrations"

# The cursor of a first page: after every row.
END_OF_TIME = datetime(9999, 1, 1, tzinfo=UTC)
LAST_ID = "~"


def _files(files: Iterable[StoredFile]) -> list[dict[str, object]]:
    return [{"path": f.path, "size_bytes": f.size_bytes, "sha256": f.sha256} for f in files]


def _weights(row: Any) -> Weights:
    return Weights(
        revision=row["revision"], key=row["artifact_key"], files=tuple(StoredFile(**file) for file in row["files"])
    )


def _base_model(row: Any) -> BaseModel:
    return BaseModel(
        model_id=row["model_id"],
        weights=_weights(row),
        architecture=row["architecture"],
        parameter_count=row["parameter_count"],
        context_tokens_max=row["context_tokens_max"],
        size_bytes=row["size_bytes"],
        source=row["source"],
        created_at=row["created_at"],
    )


def _model(row: Any) -> TunedModel:
    return TunedModel(
        id=row["id"],
        project_id=row["project_id"],
        model_id=row["model_id"],
        kind=ModelKind(row["kind"]),
        base_model=row["base_model"],
        base_revision=row["base_revision"],
        weights=_weights(row),
        adapter_rank=row["adapter_rank"],
        tuning_job=row["tuning_job"],
        lineage=row["lineage"],
        created_at=row["created_at"],
    )


def _endpoint(row: Any) -> Endpoint:
    return Endpoint(**{**dict(row), "device_indices": tuple(row["device_indices"])})


async def save_base_model(connection: Connection, model: BaseModel) -> None:
    """Makes this revision the current one of its id."""
    await QUERIES.lock_catalogue(connection, model_id=model.model_id)
    await QUERIES.retire_base_models(connection, model_id=model.model_id, revision=model.weights.revision)
    await QUERIES.add_base_model(
        connection,
        model_id=model.model_id,
        revision=model.weights.revision,
        artifact_key=model.weights.key,
        files=_files(model.weights.files),
        architecture=model.architecture,
        parameter_count=model.parameter_count,
        context_tokens_max=model.context_tokens_max,
        size_bytes=model.size_bytes,
        source=model.source,
        created_at=model.created_at,
    )


async def find_base_model(connection: Connection, model_id: str, revision: str = "") -> BaseModel | None:
    """The current revision of a base model, or a named one."""
    if revision:
        row = await QUERIES.get_base_revision(connection, model_id=model_id, revision=revision)
    else:
        row = await QUERIES.get_base_model(connection, model_id=model_id)
    return _base_model(row) if row else None


async def list_base_models(connection: Connection, after: str, page_size: int) -> list[BaseModel]:
    """Current base models by id."""
    return [_base_model(row) async for row in QUERIES.list_base_models(connection, after=after, page_size=page_size)]


async def add_model(connection: Connection, model: TunedModel) -> bool:
    """Registers what a job made; False when that was done before."""
    status = await QUERIES.add_model(
        connection,
        id=model.id,
        project_id=model.project_id,
        model_id=model.model_id,
        kind=model.kind,
        base_model=model.base_model,
        base_revision=model.base_revision,
        revision=model.weights.revision,
        artifact_key=model.weights.key,
        files=_files(model.weights.files),
        adapter_rank=model.adapter_rank,
        tuning_job=model.tuning_job,
        lineage=dict(model.lineage),
        created_at=model.created_at,
    )
    return affected(status) == 1


async def find_model(connection: Connection, project_id: str, *, id: str = "", model_id: str = "") -> TunedModel | None:
    """A live tuned model of a project, by its id or by the id that chat calls use."""
    if id:
        row = await QUERIES.get_model(connection, project_id=project_id, id=id)
    else:
        row = await QUERIES.get_model_by_id(connection, project_id=project_id, model_id=model_id)
    return _model(row) if row else None


async def list_models(
    connection: Connection, project_id: str, before: tuple[datetime, str], page_size: int
) -> list[TunedModel]:
    """Live tuned models of a project, newest first."""
    rows = QUERIES.list_models(
        connection, project_id=project_id, before_time=before[0], before_id=before[1], page_size=page_size
    )
    return [_model(row) async for row in rows]


async def delete_model(connection: Connection, project_id: str, id: str, now: datetime) -> bool:
    """Takes a tuned model out of the registry; False when there is none."""
    return affected(await QUERIES.delete_model(connection, project_id=project_id, id=id, now=now)) == 1


async def count_endpoints(connection: Connection, project_id: str) -> int:
    """Live endpoints of a project."""
    return int(await QUERIES.count_endpoints(connection, project_id=project_id))


async def add_endpoint(
    connection: Connection, endpoint: Endpoint, *, request_id: str | None, request_sha256: str
) -> bool:
    """Creates an endpoint; False when its request or its id exists already."""
    status = await QUERIES.add_endpoint(
        connection,
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


async def find_request(connection: Connection, project_id: str, request_id: str) -> tuple[str, str] | None:
    """(endpoint id, fingerprint of the request) of an earlier call with this request id."""
    row = await QUERIES.get_endpoint_request(connection, project_id=project_id, request_id=request_id)
    return (row["id"], row["request_sha256"]) if row else None


async def find_endpoint(
    connection: Connection, project_id: str, *, id: str = "", endpoint_id: str = ""
) -> Endpoint | None:
    """A live endpoint of a project, by its id or by the id that chat calls use."""
    if id:
        row = await QUERIES.get_endpoint(connection, project_id=project_id, id=id)
    else:
        row = await QUERIES.get_endpoint_by_id(connection, project_id=project_id, endpoint_id=endpoint_id)
    return _endpoint(row) if row else None


async def list_endpoints(
    connection: Connection, project_id: str, before: tuple[datetime, str], page_size: int
) -> list[Endpoint]:
    """Live endpoints of a project, newest first."""
    rows = QUERIES.list_endpoints(
        connection, project_id=project_id, before_time=before[0], before_id=before[1], page_size=page_size
    )
    return [_endpoint(row) async for row in rows]


async def list_moving(connection: Connection, batch_max: int) -> list[Endpoint]:
    """Endpoints of all projects that the keeper has to look after."""
    return [_endpoint(row) async for row in QUERIES.list_moving_endpoints(connection, batch_max=batch_max)]


async def list_resumable(connection: Connection, now: datetime, batch_max: int) -> list[Endpoint]:
    """Parked endpoints for which somebody may spend again."""
    return [_endpoint(row) async for row in QUERIES.list_resumable_endpoints(connection, now=now, batch_max=batch_max)]


async def move_endpoint(
    connection: Connection,
    id: str,
    *,
    sources: Iterable[EndpointState],
    destination: EndpointState,
    status_message: str,
    now: datetime,
) -> Endpoint | None:
    """The guarded transition; None when the endpoint is in none of the sources."""
    row = await QUERIES.move_endpoint(
        connection,
        id=id,
        sources=[str(source) for source in sources],
        destination=str(destination),
        status_message=status_message,
        now=now,
    )
    return _endpoint(row) if row else None


async def set_allocation(
    connection: Connection, id: str, *, lease_token: int, device_indices: tuple[int, ...], hardware_type: str
) -> None:
    """Notes the devices that the scheduler gave."""
    await QUERIES.set_allocation(
        connection, id=id, lease_token=lease_token, device_indices=list(device_indices), hardware_type=hardware_type
    )


async def set_status(connection: Connection, id: str, status_message: str) -> None:
    """Says in words why an endpoint waits."""
    await QUERIES.set_endpoint_status(connection, id=id, status_message=status_message)


async def bill_minutes(connection: Connection, endpoint: Endpoint, minutes: int) -> bool:
    """Counts started minutes; False when somebody else counted or the lease is another one."""
    status = await QUERIES.bill_minutes(
        connection,
        id=endpoint.id,
        lease_token=endpoint.lease_token,
        seen_minutes=endpoint.period_minutes,
        minutes=minutes,
    )
    return affected(status) == 1


async def delete_endpoint(connection: Connection, project_id: str, id: str, now: datetime) -> bool:
    """Deletes an endpoint that holds no devices; False when there is none."""
    return affected(await QUERIES.delete_endpoint(connection, project_id=project_id, id=id, now=now)) == 1


async def save_credit_word(connection: Connection, word: CreditWord, now: datetime) -> bool:
    """False when something later is known."""
    return affected(await QUERIES.save_credit_word(connection, **vars(word), now=now)) == 1


async def save_cap_word(connection: Connection, word: CapWord, now: datetime) -> bool:
    """False when something later is known."""
    return affected(await QUERIES.save_cap_word(connection, **vars(word), now=now)) == 1


async def list_words(connection: Connection, since: datetime) -> list[CreditWord | CapWord]:
    """What was heard of credit and caps since a moment."""
    credit = [CreditWord(**row) async for row in QUERIES.list_credit_words(connection, since=since)]
    caps = [CapWord(**row) async for row in QUERIES.list_cap_words(connection, since=since)]
    return [*credit, *caps]
