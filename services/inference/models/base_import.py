"""Imports a base model: spools its files, reads its facts, stores it, then lists it. Not pure: disk, store, database.

Until the last step nothing is visible. It refuses to know the messages that carry the parts.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from chassis.clock import Clock
from chassis.db.pool import Pool, transaction
from chassis.errors import Aborted, AlreadyExists, InvalidArgument, ResourceExhausted, invalid
from chassis.ids import Ids
from chassis.objects.held_folders import HeldFolders
from chassis.objects.object_store import ObjectStore
from formats.manifests import FileDigest, revision_of
from services.inference.config import InferenceSettings
from services.inference.models.answer_families import check_parser_names, parsers_of_folder
from services.inference.models.base_uploads import BaseUploads
from services.inference.models.domain import BaseModel, NameKind, NamespaceKind, Weights, name_taken, namespace_taken
from services.inference.models.import_check import check_files
from services.inference.models.model_facts import read_facts
from services.inference.models.spool import ModelSpool
from services.inference.models.store import ModelStore
from services.inference.models.stored_files import StoredFiles, spool_files

MODEL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}/[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
SOURCE = re.compile(r"[!-~]{0,300}")
# Read before any other place, by trainer, server and whoever loads an export; tokenizer_config.json may keep its own.
CHAT_TEMPLATE = "chat_template.jinja"
OTHER_TEMPLATES = ("chat_template.json",)
CHAT_TEMPLATE_BYTES_MAX = 1 << 20


@dataclass(frozen=True, kw_only=True)
class ImportHeader:
    """What an import begins with: the model's id, and where its files come from."""

    model_id: str
    source: str
    # vLLM's names, `none`, or empty for what the chat template tells.
    tool_parser: str = ""
    reasoning_parser: str = ""
    # Wins over the template that the files have; empty for none.
    chat_template: str = ""


# The header, then for each file its announcement and its chunks; None is a part that nobody knows.
ImportPart = ImportHeader | FileDigest | bytes | None


class BaseImporter:
    """At most `imports_max` imports at a time, each in a local folder of its own."""

    def __init__(
        self,
        pool: Pool,
        objects: ObjectStore,
        uploads: BaseUploads,
        folders: HeldFolders,
        *,
        settings: InferenceSettings,
        clock: Clock,
        ids: Ids,
    ) -> None:
        self._pool = pool
        self._stored = StoredFiles(objects, uploads, settings)
        self._uploads = uploads
        self._folders = folders
        self._settings = settings
        self._clock = clock
        self._ids = ids
        self._running = asyncio.Semaphore(settings.imports_max)

    async def run(self, parts: AsyncIterator[ImportPart]) -> BaseModel:
        """The imported model; a typed error names the part that is wrong."""
        if self._running.locked():
            raise ResourceExhausted(
                "CAPACITY_EXHAUSTED",
                f"{self._settings.imports_max} imports are under way (imports_max); try again later",
                retry_after_s=10,
            )
        async with self._running:
            folder = await asyncio.to_thread(self._folders.open, self._ids.new("import"))
            try:
                return await self._import(parts, folder.path)
            finally:
                await asyncio.to_thread(folder.close)

    async def _import(self, parts: AsyncIterator[ImportPart], folder: Path) -> BaseModel:
        header = check_header(await anext(parts, None))
        async with self._pool.acquire() as connection:
            # Before the files travel; the claims at the end decide.
            if await ModelStore(connection).name_kind(header.model_id) not in (None, NameKind.BASE):
                raise name_taken(header.model_id, "model_id")
            if await ModelStore(connection).namespace_kind(_namespace(header.model_id)) == NamespaceKind.PROJECT:
                raise _is_a_projects(header.model_id)
        limits = self._settings
        spool = ModelSpool(folder, bytes_max=limits.model_bytes_max, files_max=limits.model_files_max)
        await spool_files(parts, spool)
        if header.chat_template:
            await spool.put_in_place(CHAT_TEMPLATE, header.chat_template.encode(), of=OTHER_TEMPLATES)
        facts = await asyncio.to_thread(read_facts, folder, spool.files)
        await check_files(folder, self._settings)
        revision = revision_of(spool.files)
        key = f"base/{header.model_id}/{revision}/"
        model = BaseModel(
            model_id=header.model_id,
            weights=Weights(revision=revision, key=key, files=tuple(spool.files)),
            architecture=facts.architecture,
            parameter_count=facts.parameter_count,
            context_tokens_max=facts.context_tokens_max,
            size_bytes=sum(file.size_bytes for file in spool.files),
            created_at=self._clock.now(),
            source=header.source,
            parsers=await asyncio.to_thread(parsers_of_folder, folder, header.tool_parser, header.reasoning_parser),
            chat_template_given=bool(header.chat_template),
        )
        await self._stored.keep(model.weights, folder, lambda upload_id: self._list(model, upload_id))
        return model

    async def _list(self, model: BaseModel, upload_id: str) -> None:
        async with transaction(self._pool) as connection:
            models = ModelStore(connection)
            if not await models.claim_namespace(_namespace(model.model_id), NamespaceKind.BASES):
                raise _is_a_projects(model.model_id)
            if not await models.claim_name(model.model_id, NameKind.BASE, owner=model.model_id):
                raise name_taken(model.model_id, "model_id")
            if not await self._uploads.finish(connection, upload_id, model.weights.key):
                message = "the import took so long that its files were removed; import it again"
                raise Aborted("STATE_CONFLICT", message)
            await models.save_base(model)


def check_header(part: ImportPart) -> ImportHeader:
    """The header of an import; InvalidArgument for another part, or a field that is not taken."""
    if not isinstance(part, ImportHeader):
        raise InvalidArgument("INVALID_FIELD", "the first message of an import must be its header")
    if not MODEL_ID.fullmatch(part.model_id):
        problem = "must be two parts of letters, digits, '-', '_' and '.', for example finemesh/demo-llama"
        raise invalid("header.model_id", problem, message=problem)
    if not SOURCE.fullmatch(part.source):
        problem = "must be at most 300 visible ASCII characters"
        raise invalid("header.source", problem, message=problem)
    check_parser_names(part.tool_parser, part.reasoning_parser)
    if len(part.chat_template.encode()) > CHAT_TEMPLATE_BYTES_MAX:
        problem = f"must be at most {CHAT_TEMPLATE_BYTES_MAX} bytes"
        raise invalid("header.chat_template", problem, message=problem)
    return part


def _namespace(model_id: str) -> str:
    return model_id.partition("/")[0]


def _is_a_projects(model_id: str) -> AlreadyExists:
    return namespace_taken(_namespace(model_id), "a project's models", "header.model_id")
