"""What every engine inside this process keeps beside its computing: limits, unfinished requests and adapters.

It refuses to know how tokens are computed.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any

from formats.prompts.answer_ends import GENERATION_CONFIG, ends_of_adapter
from formats.prompts.faults import ModelFault
from formats.prompts.model_config import vocabulary_size
from services.inference.engines.adapters.adapter_check import check_adapter
from services.inference.engines.adapters.adapter_table import Adapter, AdapterTable
from services.inference.engines.base import (
    AdapterInvalid,
    EngineBusy,
    EngineFailed,
    EngineSettings,
    GenerateRequest,
    RequestInvalid,
    completion_tokens_allowed,
)
from services.inference.engines.engine_deadline import Deadline
from services.inference.engines.model_files import context_tokens, read_config

ENDED = "the devices of this engine may be another's by now"


class InProcessEngine(ABC):
    """The part of the engine contract that is the same for all of them."""

    def __init__(self, model_path: Path, settings: EngineSettings) -> None:
        self._model_path = model_path
        self._settings = settings
        self._config: dict[str, Any] = {}
        self._context_tokens_max = 0
        self._deadline = Deadline()
        # How many answers each request asked for.
        self._unfinished: dict[str, int] = {}
        self._table = AdapterTable(
            resident_max=settings.adapters_resident_max,
            known_max=settings.adapters_known_max,
            load=self._load,
            unload=self._unload,
        )

    @abstractmethod
    async def health(self) -> None:
        """Return when the engine can serve; raises EngineFailed otherwise."""

    @abstractmethod
    async def _load(self, adapter: Adapter) -> None:
        """Bring a checked adapter into the engine's memory."""

    @abstractmethod
    async def _unload(self, adapter: Adapter) -> None:
        """Take an adapter out of the engine's memory."""

    @property
    def on_gpus(self) -> bool:
        return False

    @property
    def context_tokens_max(self) -> int:
        return self._context_tokens_max

    @property
    def requests_unfinished(self) -> int:
        return sum(self._unfinished.values())

    def serve_until(self, until_s: float) -> None:
        self._deadline.set(until_s)

    def _check_deadline(self) -> None:
        if self._deadline.passed:
            raise EngineFailed(ENDED)

    async def load_adapter(self, revision: str, path: Path, rank: int) -> None:
        await self.health()
        ends: frozenset[int] = frozenset()
        if revision not in self._table.resident():
            await asyncio.to_thread(check_adapter, revision, path, rank, self._config, self._settings)
            ends = await asyncio.to_thread(self._ends_of, revision, path)
        await self._table.add(revision, path, rank, ends)

    def _ends_of(self, revision: str, path: Path) -> frozenset[int]:
        try:
            ends = ends_of_adapter(path)
            size = vocabulary_size(self._config)
        except ModelFault as fault:
            raise AdapterInvalid(revision, str(fault)) from fault
        if size is not None and any(token_id >= size for token_id in ends):
            raise AdapterInvalid(
                revision, f"{GENERATION_CONFIG} lists {max(ends)}, which is no token of the base model"
            )
        return ends

    async def unload_adapter(self, revision: str) -> bool:
        await self.health()
        return await self._table.remove(revision)

    def adapters(self) -> tuple[str, ...]:
        return self._table.resident()

    async def _read_model(self) -> None:
        self._config = await asyncio.to_thread(read_config, self._model_path)
        self._context_tokens_max = context_tokens(self._config, self._settings)

    @asynccontextmanager
    async def _admitted(self, request: GenerateRequest) -> AsyncGenerator[tuple[int, Adapter | None], None]:
        """The completion limit of an admitted request and its locked adapter, for as long as it is unfinished."""
        tokens_max = completion_tokens_allowed(request, self._context_tokens_max)
        if request.request_id in self._unfinished:
            raise RequestInvalid("request_id", "a request of this id is unfinished")
        if (unfinished := self.requests_unfinished) + request.sampling.choices > self._settings.queue_requests_max:
            raise EngineBusy(f"{unfinished} answers are unfinished already")
        self._unfinished[request.request_id] = request.sampling.choices
        try:
            async with self._locked(request.adapter_revision) as adapter:
                yield tokens_max, adapter
        finally:
            del self._unfinished[request.request_id]

    def _locked(self, revision: str | None) -> AbstractAsyncContextManager[Adapter | None]:
        """The adapter, held in memory for the length of the block; None for the base model alone."""
        return self._table.lock(revision) if revision is not None else nullcontext()
