"""Imports an adapter: spools its files, has them looked at, stores, then lists it. Not pure: disk, store, database.

Until the last step nothing is visible, and the same import sent again gives the same model. It refuses to know the
messages that carry the parts.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chassis.clock import Clock
from chassis.db.pool import Connection, Pool, transaction
from chassis.errors import Aborted, DeadlineExceeded, InvalidArgument, ResourceExhausted, invalid
from chassis.identity import Caller
from chassis.ids import Ids
from chassis.objects.held_folders import HeldFolders
from chassis.objects.object_store import ObjectStore
from formats.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from formats.manifests import FileDigest, revision_of
from formats.prompts.answer_ends import GENERATION_CONFIG
from services.inference.config import InferenceSettings
from services.inference.models.base_import import SOURCE
from services.inference.models.base_uploads import BaseUploads
from services.inference.models.domain import (
    BaseModel,
    ModelKind,
    TunedModel,
    Weights,
    model_invalid,
    name_taken,
    unknown_model,
)
from services.inference.models.import_check import ask_about_files
from services.inference.models.model_registry import Registry
from services.inference.models.spool import ModelSpool
from services.inference.models.store import ModelStore
from services.inference.models.stored_files import StoredFiles, spool_files

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
NEEDED = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
# Of the last one, what ends an answer: a turn may have been taught to end otherwise than the base model ends it.
FILES = (*NEEDED, GENERATION_CONFIG)
# By name: it is started, never imported.
PROGRAM = "services.inference.engines.adapters.import_program"


@dataclass(frozen=True, kw_only=True)
class AdapterHeader:
    """What an import begins with: the model's name in the project, its base model, and where its files come from."""

    output_name: str
    base_model: str
    source: str


# The header, then for each file its announcement and its chunks; None is a part that nobody knows.
AdapterPart = AdapterHeader | FileDigest | bytes | None


class AdapterImporter:
    """At most `adapter_imports_max` imports at a time, one of each organization, each in a local folder of its own."""

    def __init__(
        self,
        pool: Pool,
        objects: ObjectStore,
        uploads: BaseUploads,
        folders: HeldFolders,
        registry: Registry,
        *,
        settings: InferenceSettings,
        clock: Clock,
        ids: Ids,
    ) -> None:
        self._pool = pool
        self._objects = objects
        self._stored = StoredFiles(objects, uploads, settings)
        self._uploads = uploads
        self._folders = folders
        self._registry = registry
        self._settings = settings
        self._clock = clock
        self._ids = ids
        self._running: set[str] = set()

    async def run(self, caller: Caller, parts: AsyncIterator[AdapterPart]) -> TunedModel:
        """The imported model; a typed error names the part that is wrong."""
        if caller.account in self._running or len(self._running) >= self._settings.adapter_imports_max:
            raise ResourceExhausted(
                "CAPACITY_EXHAUSTED",
                "an import of this organization is under way, or as many as adapter_imports_max,"
                f" {self._settings.adapter_imports_max}; try again later",
                retry_after_s=10,
            )
        self._running.add(caller.account)
        try:
            folder = await asyncio.to_thread(self._folders.open, self._ids.new("import"))
            try:
                return await self._import(caller, self._in_time(parts), folder.path)
            finally:
                await asyncio.to_thread(folder.close)
        finally:
            self._running.discard(caller.account)

    async def _import(self, caller: Caller, parts: AsyncIterator[AdapterPart], folder: Path) -> TunedModel:
        header = check_header(await anext(parts, None))
        model_id = f"{caller.namespace}/{header.output_name}"
        async with self._pool.acquire() as connection:
            # Before the files travel; the claims at the end decide.
            base = await ModelStore(connection).find_base(header.base_model)
            earlier = await ModelStore(connection).find(caller.tenant, model_id=model_id)
            if base is None:
                raise unknown_model(header.base_model)
            if earlier is None and await ModelStore(connection).name_kind(model_id) is not None:
                raise name_taken(model_id, "output_name")
            await self._check_count(connection, caller)
        spool = ModelSpool(
            folder, bytes_max=self._settings.adapter_bytes_max, files_max=len(FILES), setting="adapter_bytes_max"
        )
        await spool_files(_only_of_an_adapter(parts), spool)
        came = {file.path for file in spool.files}
        if missing := [name for name in NEEDED if name not in came]:
            raise model_invalid(missing[0], "is missing; an adapter in peft's format has it")
        given = revision_of(spool.files)
        rank = await self._check(folder, base)
        files = tuple([await asyncio.to_thread(_digest, folder, name) for name in FILES if name in came])
        model = self._model(caller, header, base, rank, files, given)
        if earlier is not None:
            return _same(earlier, model)
        await self._stored.keep(model.weights, folder, lambda upload_id: self._list(caller, model, upload_id))
        return model

    async def _in_time(self, parts: AsyncIterator[AdapterPart]) -> AsyncIterator[AdapterPart]:
        """The parts, while they come: whoever holds a place and sends nothing loses it."""
        settings, now = self._settings, asyncio.get_running_loop().time
        end_s = now() + settings.adapter_import_s_max
        while True:
            try:
                async with asyncio.timeout(min(settings.adapter_import_idle_s_max, end_s - now())):
                    part = await anext(parts)
            except StopAsyncIteration:
                return
            except TimeoutError as error:
                message = (
                    f"nothing came for {settings.adapter_import_idle_s_max:g} seconds (adapter_import_idle_s_max), or"
                    f" all of it took {settings.adapter_import_s_max:g} (adapter_import_s_max); nothing was kept"
                )
                raise DeadlineExceeded("DEADLINE_TOO_SHORT", message) from error
            yield part

    async def _check(self, folder: Path, base: BaseModel) -> int:
        """The adapter's rank. Its config is written anew, layer by layer, and its list of ends alone."""
        request = {
            "folder": str(folder),
            "base_config": await self._config_of(base),
            "rank_max": self._settings.adapter_rank_max,
            "bytes_max": self._settings.adapter_bytes_max,
        }
        found = await ask_about_files(PROGRAM, request, self._settings)
        if not found["ok"]:
            raise model_invalid("adapter", str(found["problem"]))
        return int(found["rank"])

    async def _config_of(self, base: BaseModel) -> dict[str, Any]:
        chunks = self._objects.read(
            base.weights.key + "config.json", chunk_bytes_max=self._settings.chunk_bytes_max, offset_bytes=0
        )
        config: dict[str, Any] = json.loads(b"".join([chunk async for chunk in chunks]))
        return config

    def _model(
        self,
        caller: Caller,
        header: AdapterHeader,
        base: BaseModel,
        rank: int,
        files: tuple[FileDigest, ...],
        given: str,
    ) -> TunedModel:
        id = self._ids.new("ml_")
        return TunedModel(
            id=id,
            project_id=caller.tenant,
            model_id=f"{caller.namespace}/{header.output_name}",
            kind=ModelKind.ADAPTER,
            base_model=base.model_id,
            base_revision=base.weights.revision,
            # Of its own, so that nobody else needs what is deleted with it. No base model's id begins so.
            weights=Weights(revision=revision_of(files), key=f"base/_adapters/{caller.tenant}/{id}/", files=files),
            adapter_rank=rank,
            tuning_job="",
            lineage={"imported_by": caller.subject, "imported_from": header.source, "imported_revision": given},
            created_at=self._clock.now(),
        )

    async def _list(self, caller: Caller, model: TunedModel, upload_id: str) -> None:
        async with transaction(self._pool) as connection:
            await ModelStore(connection).lock_project(caller.tenant)
            await self._check_count(connection, caller)
            if not await self._uploads.finish(connection, upload_id, model.weights.key):
                message = "the import took so long that its files were removed; import it again"
                raise Aborted("STATE_CONFLICT", message)
            await self._registry.import_adapter(connection, model)

    async def _check_count(self, connection: Connection, caller: Caller) -> None:
        limit = self._settings.imported_adapters_max
        if await ModelStore(connection).count_imported(caller.tenant) >= limit:
            raise ResourceExhausted(
                "SIZE_LIMIT", f"a project has at most {limit} imported adapters (imported_adapters_max); delete one"
            )


def check_header(part: AdapterPart) -> AdapterHeader:
    """The header of an import; InvalidArgument for another part, or a field that is not taken."""
    if not isinstance(part, AdapterHeader):
        raise InvalidArgument("INVALID_FIELD", "the first message of an import must be its header")
    if not NAME.fullmatch(part.output_name):
        problem = "must be 1 to 63 lower-case letters, digits, `-`, `_` or `.`, beginning with a letter or digit"
        raise invalid("header.output_name", problem, message=f"header.output_name {problem}")
    if not SOURCE.fullmatch(part.source):
        problem = "must be at most 300 visible ASCII characters"
        raise invalid("header.source", problem, message=f"header.source {problem}")
    return part


async def _only_of_an_adapter(parts: AsyncIterator[AdapterPart]) -> AsyncIterator[AdapterPart]:
    async for part in parts:
        if isinstance(part, FileDigest) and part.path not in FILES:
            raise model_invalid("file.path", f"{part.path[:80]!r} is none of {', '.join(FILES)}", "INVALID_FIELD")
        yield part


def _same(earlier: TunedModel, model: TunedModel) -> TunedModel:
    """The model that the same import made before, as when its answer was lost."""
    asked = (model.weights.revision, model.base_model, model.base_revision, "")
    if asked != (earlier.weights.revision, earlier.base_model, earlier.base_revision, earlier.tuning_job):
        raise name_taken(model.model_id, "output_name")
    return earlier


def _digest(folder: Path, name: str) -> FileDigest:
    """Of the files as they are stored; those in JSON are not the ones that came."""
    path = folder / name
    with path.open("rb") as content:
        sha256 = hashlib.file_digest(content, "sha256").hexdigest()
    return FileDigest(path=name, size_bytes=path.stat().st_size, sha256=sha256)
