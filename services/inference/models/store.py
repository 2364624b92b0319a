"""Reads and writes the catalogue of base models and the registry of tuned ones. It decides nothing."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from chassis.db.pool import Connection
from chassis.db.queries import affected, load_queries
from formats.manifests import FileDigest
from services.inference.engines.answer_form import AnswerParsers
from services.inference.models.domain import (
    IMPORTED,
    BaseModel,
    ModelKind,
    NameKind,
    NamespaceKind,
    TunedModel,
    Weights,
)

QUERIES = load_queries(Path(__file__).parent / "queries.sql")


class ModelStore:
    """Base models and tuned models over one connection, inside the caller's transaction if there is one."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def save_base(self, model: BaseModel) -> None:
        """Makes this revision the current one of its id."""
        await QUERIES.lock_catalogue(self._connection, model_id=model.model_id)
        await QUERIES.retire_base_models(self._connection, model_id=model.model_id, revision=model.weights.revision)
        await QUERIES.add_base_model(
            self._connection,
            model_id=model.model_id,
            revision=model.weights.revision,
            artifact_key=model.weights.key,
            files=_rows_of(model.weights.files),
            architecture=model.architecture,
            parameter_count=model.parameter_count,
            context_tokens_max=model.context_tokens_max,
            size_bytes=model.size_bytes,
            source=model.source,
            tool_parser=model.parsers.tool,
            reasoning_parser=model.parsers.reasoning,
            chat_template_given=model.chat_template_given,
            created_at=model.created_at,
        )

    async def find_base(self, model_id: str, revision: str = "") -> BaseModel | None:
        """The current revision of a base model, or a named one."""
        if revision:
            row = await QUERIES.get_base_revision(self._connection, model_id=model_id, revision=revision)
        else:
            row = await QUERIES.get_base_model(self._connection, model_id=model_id)
        return _base_of(row) if row else None

    async def list_bases(self, after: str, page_size: int) -> list[BaseModel]:
        """Current base models by id."""
        rows = QUERIES.list_base_models(self._connection, after=after, page_size=page_size)
        return [_base_of(row) async for row in rows]

    async def add(self, model: TunedModel) -> bool:
        """Registers what a job made, or an import; False when that was done before."""
        status = await QUERIES.add_model(
            self._connection,
            id=model.id,
            project_id=model.project_id,
            model_id=model.model_id,
            kind=model.kind,
            base_model=model.base_model,
            base_revision=model.base_revision,
            revision=model.weights.revision,
            artifact_key=model.weights.key,
            files=_rows_of(model.weights.files),
            adapter_rank=model.adapter_rank,
            tuning_job=model.owner,
            lineage=dict(model.lineage),
            created_at=model.created_at,
        )
        return affected(status) == 1

    async def find(self, project_id: str, *, id: str = "", model_id: str = "") -> TunedModel | None:
        """A live tuned model of a project, by its id or by the id that chat calls use."""
        if id:
            row = await QUERIES.get_model(self._connection, project_id=project_id, id=id)
        else:
            row = await QUERIES.get_model_by_id(self._connection, project_id=project_id, model_id=model_id)
        return _tuned_of(row) if row else None

    async def page(self, project_id: str, before: tuple[datetime, str], page_size: int) -> list[TunedModel]:
        """Live tuned models of a project, newest first."""
        rows = QUERIES.list_models(
            self._connection, project_id=project_id, before_time=before[0], before_id=before[1], page_size=page_size
        )
        return [_tuned_of(row) async for row in rows]

    async def count_imported(self, project_id: str) -> int:
        """Live adapters that the project imported."""
        return int(await QUERIES.count_imported(self._connection, project_id=project_id, pattern=f"{IMPORTED}%"))

    async def lock_project(self, project_id: str) -> None:
        """Lets one import of a project at a time be listed, so that none is counted past the limit."""
        await QUERIES.lock_project_imports(self._connection, project_id=project_id)

    async def delete(self, project_id: str, id: str, now: datetime) -> TunedModel | None:
        """Takes a tuned model out of the registry and frees its name; None when there is none."""
        row = await QUERIES.delete_model(self._connection, project_id=project_id, id=id, now=now)
        if row is None:
            return None
        await self.free_name(row["model_id"], NameKind.TUNED, owner=row["tuning_job"])
        return _tuned_of(row)

    async def claim_name(self, name: str, kind: NameKind, *, owner: str) -> bool:
        """Takes a name that chat calls use, also once more for the same owner; False when it means something else."""
        return affected(await QUERIES.claim_name(self._connection, name=name, kind=kind, owner=owner)) == 1

    async def free_name(self, name: str, kind: NameKind, *, owner: str) -> None:
        """Lets others take a name; does nothing when the owner does not have it."""
        await QUERIES.free_name(self._connection, name=name, kind=kind, owner=owner)

    async def claim_namespace(self, namespace: str, kind: NamespaceKind) -> bool:
        """Takes the first part of names, also once more for the same kind; False when it is the other's."""
        return affected(await QUERIES.claim_namespace(self._connection, namespace=namespace, kind=kind)) == 1

    async def namespace_kind(self, namespace: str) -> NamespaceKind | None:
        """Whose names begin so; None when nobody's do."""
        kind = await QUERIES.get_namespace_kind(self._connection, namespace=namespace)
        return NamespaceKind(kind) if kind is not None else None

    async def name_kind(self, name: str) -> NameKind | None:
        """What a name means now; None when nobody has it."""
        kind = await QUERIES.get_name_kind(self._connection, name=name)
        return NameKind(kind) if kind is not None else None


class UploadStore:
    """Uploads of models that are not listed yet, and files of imported adapters that were deleted."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def begin(self, upload_id: str, key: str) -> bool:
        """False while files under this key are being removed."""
        await QUERIES.lock_upload_key(self._connection, artifact_key=key)
        return affected(await QUERIES.begin_upload(self._connection, upload_id=upload_id, artifact_key=key)) == 1

    async def finish(self, upload_id: str, key: str) -> bool:
        """False when files under its key are being removed, or were."""
        await QUERIES.lock_upload_key(self._connection, artifact_key=key)
        return affected(await QUERIES.finish_upload(self._connection, upload_id=upload_id, artifact_key=key)) == 1

    async def claim(self, upload_id: str, upload_s_max: float) -> str | None:
        """Where the files are that are to be removed; None when the upload ended, or others need what is there."""
        key: str | None = await QUERIES.get_upload_key(self._connection, upload_id=upload_id)
        if key is None:
            return None
        await QUERIES.lock_upload_key(self._connection, artifact_key=key)
        if await QUERIES.is_upload_needed(
            self._connection, upload_id=upload_id, artifact_key=key, upload_s_max=upload_s_max
        ):
            await self.forget(upload_id)
            return None
        claimed = affected(await QUERIES.claim_upload(self._connection, upload_id=upload_id)) == 1
        return key if claimed else None

    async def forget(self, upload_id: str) -> None:
        await QUERIES.forget_upload(self._connection, upload_id=upload_id)

    async def list_dead(self, *, upload_s_max: float, claim_s: float, batch_max: int) -> list[str]:
        rows = QUERIES.list_dead_uploads(
            self._connection, upload_s_max=upload_s_max, claim_s=claim_s, batch_max=batch_max
        )
        return [row["upload_id"] async for row in rows]


def _rows_of(files: Iterable[FileDigest]) -> list[dict[str, object]]:
    return [{"path": f.path, "size_bytes": f.size_bytes, "sha256": f.sha256} for f in files]


def weights_of(row: Any) -> Weights:
    """The weights that a row of base_models or models names."""
    files = tuple(FileDigest(**file) for file in row["files"])
    return Weights(revision=row["revision"], key=row["artifact_key"], files=files)


def _base_of(row: Any) -> BaseModel:
    return BaseModel(
        model_id=row["model_id"],
        weights=weights_of(row),
        architecture=row["architecture"],
        parameter_count=row["parameter_count"],
        context_tokens_max=row["context_tokens_max"],
        size_bytes=row["size_bytes"],
        source=row["source"],
        parsers=AnswerParsers(tool=row["tool_parser"], reasoning=row["reasoning_parser"]),
        chat_template_given=row["chat_template_given"],
        created_at=row["created_at"],
    )


def _tuned_of(row: Any) -> TunedModel:
    return TunedModel(
        id=row["id"],
        project_id=row["project_id"],
        model_id=row["model_id"],
        kind=ModelKind(row["kind"]),
        base_model=row["base_model"],
        base_revision=row["base_revision"],
        weights=weights_of(row),
        adapter_rank=row["adapter_rank"],
        tuning_job="" if row["tuning_job"].startswith(IMPORTED) else row["tuning_job"],
        lineage=row["lineage"],
        created_at=row["created_at"],
    )
