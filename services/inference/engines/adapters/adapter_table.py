"""Which adapters an engine knows, which of them are in its memory, and which are locked by requests.

Pure bookkeeping over two callbacks; it refuses to know how an adapter gets into the memory of an engine.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from services.inference.engines.base import AdapterNotLoaded, EngineBusy

_NUMBER_MAX = (1 << 31) - 1


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter under its content-derived revision; `number` is the same for a revision in every engine. `ends` are
    token ids that end its answers, beside those of the base model."""

    revision: str
    number: int
    path: Path
    rank: int
    ends: frozenset[int] = frozenset()


class AdapterTable:
    """Keeps at most `resident_max` adapters in memory; the least recently used one without a running request leaves.

    An adapter is locked from admission to the end of its request, not only to the first token: an engine that lost it
    in between would have to read it from disk in the middle of a step, or fail when its folder is gone.
    """

    def __init__(
        self,
        *,
        resident_max: int,
        known_max: int,
        load: Callable[[Adapter], Awaitable[None]],
        unload: Callable[[Adapter], Awaitable[None]],
    ) -> None:
        self._resident_max = resident_max
        self._known_max = known_max
        self._load = load
        self._unload = unload
        self._known: OrderedDict[str, Adapter] = OrderedDict()
        self._resident: OrderedDict[str, Adapter] = OrderedDict()
        self._locks: dict[str, int] = {}
        # One change at a time: a slot that is being emptied must not be filled twice.
        self._changing = asyncio.Lock()

    def resident(self) -> tuple[str, ...]:
        """Revisions in memory, least recently used first."""
        return tuple(self._resident)

    async def add(self, revision: str, path: Path, rank: int, ends: frozenset[int] = frozenset()) -> None:
        """Know the adapter and bring it into memory. A failed load leaves no trace of it."""
        if revision in self._known and revision in self._resident:
            self._touch(revision)
            return
        async with self._changing:
            known = self._known.get(revision)
            adapter = known or Adapter(
                revision=revision, number=self._free_number(revision), path=path, rank=rank, ends=ends
            )
            await self._make_resident(adapter)
            self._known[revision] = adapter
            self._touch(revision)
            self._forget_above_limit()

    async def remove(self, revision: str) -> bool:
        """Forget the adapter. While requests still use it, it stays in memory, first in the line to leave."""
        known = self._known.pop(revision, None)
        async with self._changing:
            adapter = self._resident.get(revision)
            if adapter is not None and revision not in self._known:
                if self._locks.get(revision):
                    self._resident.move_to_end(revision, last=False)
                else:
                    await self._drop(adapter)
        return known is not None

    @asynccontextmanager
    async def lock(self, revision: str) -> AsyncGenerator[Adapter, None]:
        """Hold the adapter in memory, bringing it back when it was evicted since `add`."""
        if revision not in self._known:
            raise AdapterNotLoaded(revision)
        if revision not in self._resident:
            async with self._changing:
                adapter = self._known.get(revision)
                if adapter is None:
                    raise AdapterNotLoaded(revision)
                await self._make_resident(adapter)
                self._locks[revision] = self._locks.get(revision, 0) + 1
        else:
            self._locks[revision] = self._locks.get(revision, 0) + 1
        self._touch(revision)
        try:
            yield self._resident[revision]
        finally:
            self._locks[revision] -= 1
            if self._locks[revision] == 0:
                del self._locks[revision]

    async def _make_resident(self, adapter: Adapter) -> None:
        if adapter.revision in self._resident:
            return
        if len(self._resident) >= self._resident_max:
            idle = next((one for name, one in self._resident.items() if not self._locks.get(name)), None)
            if idle is None:
                raise EngineBusy(f"all {self._resident_max} adapter slots are in use by running requests")
            await self._drop(idle)
        await self._load(adapter)
        self._resident[adapter.revision] = adapter

    async def _drop(self, adapter: Adapter) -> None:
        # Out of the table before the engine is asked, so that no request can lock what is leaving.
        del self._resident[adapter.revision]
        await self._unload(adapter)

    def _touch(self, revision: str) -> None:
        for table in (self._known, self._resident):
            if revision in table:
                table.move_to_end(revision)

    def _forget_above_limit(self) -> None:
        while len(self._known) > self._known_max:
            idle = next((name for name in self._known if name not in self._resident), None)
            if idle is None:
                return
            del self._known[idle]

    def _free_number(self, revision: str) -> int:
        taken = {adapter.number for table in (self._known, self._resident) for adapter in table.values()}
        if revision in self._resident:
            return self._resident[revision].number
        number = int.from_bytes(hashlib.sha256(revision.encode()).digest()[:4], "big") % _NUMBER_MAX + 1
        while number in taken:
            number = number % _NUMBER_MAX + 1
        return number
