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
from chassis.identity import current_caller
from chassis.ids import Ids
from finemesh.artifacts.v1 import artifact_pb2
from finemesh.datasets.v1 import dataset_service_pb2, dataset_service_pb2_grpc
from services.trainer.artifacts.convert import digests_from_proto
from services.trainer.artifacts.file_cache import FileCache
from services.trainer.config import TrainerSettings
from services.trainer.datasets.analysis_line import AnalysisLine, LineLimits, Ticket
from services.trainer.datasets.analysis_program import analyze, describe, preview
from services.trainer.datasets.convert import asker_from_proto
from services.trainer.inputs import fetch
from services.trainer.inputs.attempt_keys import check_base, check_dataset
from services.trainer.node import work_folders
from services.trainer.node.work_folders import NodeFolder

log = structlog.get_logger()

Request = dataset_service_pb2.AnalyzeDatasetRequest | dataset_service_pb2.PreviewDatasetRequest
Answer = dataset_service_pb2.AnalyzeDatasetResponse
FULL_NAME = "finemesh.datasets.v1.DatasetService"


class _Analysis:
    """One analysis for all whose questions are equal, from the first of them until nobody waits any more."""

    def __init__(self, task: asyncio.Task[Answer], ticket: Ticket) -> None:
        self.task = task
        self.ticket = ticket


class DatasetService(dataset_service_pb2_grpc.DatasetServiceServicer):
    """Equal requests in flight share one analysis. It ends when the last of its callers is gone, by whatever way."""

    def __init__(self, cache: FileCache, node_folder: NodeFolder, settings: TrainerSettings, ids: Ids) -> None:
        self._cache = cache
        self._node_folder = node_folder
        self._settings = settings
        self._ids = ids
        self._line = AnalysisLine(_limits_of(settings))
        # Of their own: to describe a model takes seconds and must not wait for analyses, which may take an hour.
        self._description_slots = asyncio.Semaphore(settings.descriptions_concurrent_max)
        self._shared: dict[bytes, _Analysis] = {}
        self._tasks: set[asyncio.Task[Answer]] = set()
        self._answers: OrderedDict[bytes, Answer] = OrderedDict()

    async def AnalyzeDataset(self, request: dataset_service_pb2.AnalyzeDatasetRequest, context: object) -> Answer:
        _check_keys(request)
        asker = asker_from_proto(request.purpose, current_caller())
        question = dataset_service_pb2.AnalyzeDatasetRequest()
        question.CopyFrom(request)
        question.ClearField("purpose")
        key = question.SerializeToString(deterministic=True)
        known = self._answers.get(key)
        if known is not None:
            self._answers.move_to_end(key)
            return known
        analysis = self._shared.get(key) or self._begin(key, question)
        try:
            with self._line.asking(analysis.ticket, asker):
                return await asyncio.shield(analysis.task)
        finally:
            if not analysis.ticket.askers:
                self._withdraw(key, analysis)

    async def PreviewDataset(
        self, request: dataset_service_pb2.PreviewDatasetRequest, context: object
    ) -> dataset_service_pb2.PreviewDatasetResponse:
        _check_keys(request)
        ticket = self._ticket(request)
        asker = asker_from_proto(dataset_service_pb2.ANALYSIS_PURPOSE_UNSPECIFIED, current_caller())
        with self._line.asking(ticket, asker):
            async with self._line.place(ticket), self._fetched(request) as (folder, dataset):
                return await preview(request, folder, dataset, fetch.BASE, self._settings)

    async def DescribeModel(
        self, request: dataset_service_pb2.DescribeModelRequest, context: object
    ) -> dataset_service_pb2.DescribeModelResponse:
        check_base(request.base_model)
        async with self._description_slots, self._with_base(request.base_model) as folder:
            return await describe(folder, fetch.BASE, self._settings)

    async def drain(self) -> None:
        """Ends the analyses that nobody will hear of any more, and their processes."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _begin(self, key: bytes, request: dataset_service_pb2.AnalyzeDatasetRequest) -> _Analysis:
        ticket = self._ticket(request)
        # A context of its own: the first caller's deadline and identity are not those of the others.
        task = asyncio.get_running_loop().create_task(self._analyze(request, ticket), context=contextvars.Context())
        analysis = self._shared[key] = _Analysis(task, ticket)
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._end(key, analysis))
        return analysis

    def _withdraw(self, key: bytes, analysis: _Analysis) -> None:
        """From now on nobody can join it: whoever asks next begins anew."""
        if self._shared.get(key) is analysis:
            del self._shared[key]
        if not analysis.task.done():
            log.info("analysis_withdrawn")
            analysis.task.cancel()

    def _end(self, key: bytes, analysis: _Analysis) -> None:
        task = analysis.task
        self._tasks.discard(task)
        if self._shared.get(key) is analysis:
            del self._shared[key]
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            self._answers[key] = task.result()
            if len(self._answers) > self._settings.analyses_remembered_max:
                self._answers.popitem(last=False)
        elif not isinstance(error, DomainError):
            log.error("analysis_failed", exc_info=error)

    def _ticket(self, request: Request) -> Ticket:
        work_bytes = sum(max(file.size_bytes, file.work_bytes) for file in request.dataset.files)
        return Ticket(is_large=work_bytes >= self._settings.large_analysis_bytes_min)

    async def _analyze(self, request: dataset_service_pb2.AnalyzeDatasetRequest, ticket: Ticket) -> Answer:
        async with self._line.place(ticket), self._fetched(request) as (folder, dataset):
            return await analyze(request, folder, dataset, fetch.BASE, self._settings)

    @contextlib.asynccontextmanager
    async def _fetched(self, request: Request) -> AsyncIterator[tuple[Path, str]]:
        """As `_with_base`, and where below that folder the dataset is."""
        async with self._with_base(request.base_model) as folder:
            yield folder, await fetch.fetch_file(request.dataset, folder, "inputs/train", self._cache)

    @contextlib.asynccontextmanager
    async def _with_base(self, base: artifact_pb2.Artifact) -> AsyncIterator[Path]:
        """A folder with what rendering needs of `base`."""
        # At once: in a thread of its own the folder could come to be after its caller was cancelled, and stay.
        folder = self._node_folder.create("analysis", self._ids.uuid().hex)
        try:
            await self._cache.place(base.key, digests_from_proto(base), folder / fetch.BASE, wanted=fetch.is_no_weight)
            yield folder
        finally:
            await asyncio.to_thread(work_folders.remove, folder)


def _check_keys(request: Request) -> None:
    """For a user only files of the user's project are read, and base models for everybody."""
    check_dataset(request.dataset, current_caller().tenant)
    check_base(request.base_model)


def _limits_of(settings: TrainerSettings) -> LineLimits:
    return LineLimits(
        running_max=settings.analyses_concurrent_max,
        large_max=settings.large_analyses_concurrent_max,
        quotes_per_key_max=settings.quote_analyses_per_key_max,
        waiting_max=settings.analyses_waiting_max,
    )
