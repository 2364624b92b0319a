"""The internal DatasetService: fetches a dataset and a tokenizer, has them counted, remembers the answers.

It knows no price and stores nothing: the answers in memory only save the same work a second time.
"""

import asyncio
import contextlib
import contextvars
from collections import OrderedDict
from collections.abc import AsyncIterator
from pathlib import Path

import structlog

from chassis.errors import DomainError
from chassis.ids import Ids
from finemesh.artifacts.v1 import artifact_pb2
from finemesh.datasets.v1 import dataset_service_pb2, dataset_service_pb2_grpc
from services.trainer.artifacts.convert import digests_from_proto
from services.trainer.artifacts.file_cache import FileCache
from services.trainer.config import TrainerSettings
from services.trainer.datasets.analysis_program import analyze, describe, preview
from services.trainer.inputs import fetch
from services.trainer.node import work_folders
from services.trainer.node.work_folders import NodeFolder

log = structlog.get_logger()

Request = dataset_service_pb2.AnalyzeDatasetRequest | dataset_service_pb2.PreviewDatasetRequest
Answer = dataset_service_pb2.AnalyzeDatasetResponse
FULL_NAME = "finemesh.datasets.v1.DatasetService"


class DatasetService(dataset_service_pb2_grpc.DatasetServiceServicer):
    """Equal requests in flight share one analysis, which goes on when its callers give up: they will ask again."""

    def __init__(self, cache: FileCache, node_folder: NodeFolder, settings: TrainerSettings, ids: Ids) -> None:
        self._cache = cache
        self._node_folder = node_folder
        self._settings = settings
        self._ids = ids
        self._slots = asyncio.Semaphore(settings.analyses_concurrent_max)
        # Of their own: to describe a model takes seconds and must not wait for analyses, which may take an hour.
        self._description_slots = asyncio.Semaphore(settings.descriptions_concurrent_max)
        self._running: dict[bytes, asyncio.Task[Answer]] = {}
        self._answers: OrderedDict[bytes, Answer] = OrderedDict()

    async def AnalyzeDataset(self, request: dataset_service_pb2.AnalyzeDatasetRequest, context: object) -> Answer:
        key = request.SerializeToString(deterministic=True)
        known = self._answers.get(key)
        if known is not None:
            self._answers.move_to_end(key)
            return known
        return await asyncio.shield(self._running.get(key) or self._begin(key, request))

    async def PreviewDataset(
        self, request: dataset_service_pb2.PreviewDatasetRequest, context: object
    ) -> dataset_service_pb2.PreviewDatasetResponse:
        async with self._fetched(request) as (folder, dataset):
            return await preview(request, folder, dataset, fetch.BASE, self._settings)

    async def DescribeModel(
        self, request: dataset_service_pb2.DescribeModelRequest, context: object
    ) -> dataset_service_pb2.DescribeModelResponse:
        async with self._with_base(request.base_model, self._description_slots) as folder:
            return await describe(folder, fetch.BASE, self._settings)

    async def drain(self) -> None:
        """Ends the analyses that nobody will hear of any more, and their processes."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _begin(self, key: bytes, request: dataset_service_pb2.AnalyzeDatasetRequest) -> asyncio.Task[Answer]:
        # A context of its own: the first caller's deadline and identity are not those of the others.
        task = asyncio.get_running_loop().create_task(self._analyze(request), context=contextvars.Context())
        self._running[key] = task
        task.add_done_callback(lambda done: self._end(key, done))
        return task

    def _end(self, key: bytes, task: asyncio.Task[Answer]) -> None:
        del self._running[key]
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            self._answers[key] = task.result()
            if len(self._answers) > self._settings.analyses_remembered_max:
                self._answers.popitem(last=False)
        elif not isinstance(error, DomainError):
            log.error("analysis_failed", exc_info=error)

    async def _analyze(self, request: dataset_service_pb2.AnalyzeDatasetRequest) -> Answer:
        async with self._fetched(request) as (folder, dataset):
            return await analyze(request, folder, dataset, fetch.BASE, self._settings)

    @contextlib.asynccontextmanager
    async def _fetched(self, request: Request) -> AsyncIterator[tuple[Path, str]]:
        """As `_with_base`, and where below that folder the dataset is."""
        async with self._with_base(request.base_model, self._slots) as folder:
            yield folder, await fetch.fetch_file(request.dataset, folder, "inputs/train", self._cache)

    @contextlib.asynccontextmanager
    async def _with_base(self, base: artifact_pb2.Artifact, slots: asyncio.Semaphore) -> AsyncIterator[Path]:
        """One of `slots`, and a folder with what rendering needs of `base`."""
        async with slots:
            folder = await asyncio.to_thread(self._node_folder.create, "analysis", self._ids.uuid().hex)
            try:
                await self._cache.place(
                    base.key, digests_from_proto(base), folder / fetch.BASE, wanted=fetch.is_no_weight
                )
                yield folder
            finally:
                await asyncio.to_thread(work_folders.remove, folder)
