"""Keeps the engines in memory, started on first use. Not pure: engines.

There is one per base model, per fully tuned model and per dedicated endpoint. It knows how engines live and die; it
knows no tenant, no price and no message of the wire.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from chassis.clock import Clock
from services.inference.engines.base import Engine, EngineBusy, EngineFailed, EngineSettings

log = structlog.get_logger()

Opener = Callable[[Path, EngineSettings], Awaitable[Engine]]


@dataclass(frozen=True, kw_only=True)
class EngineKey:
    """What an engine serves: a revision of weights, shared, or for one endpoint under one lease alone."""

    revision: str
    owner: str = ""


@dataclass(kw_only=True)
class _Slot:
    """One engine with its users. `starting` is shared by everybody who waits for it."""

    starting: asyncio.Task[Engine]
    users: int = 0
    used_at: float = 0.0
    watcher: asyncio.Task[None] | None = field(default=None)


class EnginePool:
    """At most `engines_max` shared engines; the longest unused one makes room. Engines of endpoints are counted apart:
    their devices are their own."""

    def __init__(self, *, open_engine: Opener, engines_max: int, clock: Clock) -> None:
        self._open_engine = open_engine
        self._engines_max = engines_max
        self._clock = clock
        self._slots: dict[EngineKey, _Slot] = {}

    @asynccontextmanager
    async def use(
        self, key: EngineKey, folder: Callable[[], Awaitable[Path]], settings: EngineSettings
    ) -> AsyncIterator[Engine]:
        """A started engine for the length of the block. EngineFailed when it cannot start, EngineBusy when there is no
        room for it."""
        slot = self._slots.get(key) or await self._add(key, folder, settings)
        slot.users += 1
        try:
            # Shielded: the start goes on for the others when one caller gives up.
            yield await asyncio.shield(slot.starting)
        finally:
            slot.users -= 1
            slot.used_at = self._clock.monotonic()

    def is_running(self, key: EngineKey) -> bool:
        """Whether the engine has started and not failed."""
        slot = self._slots.get(key)
        return (
            slot is not None
            and slot.starting.done()
            and not slot.starting.cancelled()
            and not slot.starting.exception()
        )

    async def remove(self, key: EngineKey) -> None:
        """Stops an engine; fine when there is none."""
        slot = self._slots.pop(key, None)
        if slot is not None:
            await self._stop(slot)

    async def close(self) -> None:
        """Stops every engine."""
        slots, self._slots = list(self._slots.values()), {}
        await asyncio.gather(*(self._stop(slot) for slot in slots))

    async def _add(self, key: EngineKey, folder: Callable[[], Awaitable[Path]], settings: EngineSettings) -> _Slot:
        if not key.owner:
            await self._make_room()
        # Making room gave the loop away: somebody else may have added the same engine meanwhile.
        if key not in self._slots:
            task = asyncio.create_task(self._start(key, folder, settings), name=f"engine-{key.revision}")
            self._slots[key] = _Slot(starting=task, used_at=self._clock.monotonic())
        return self._slots[key]

    async def _make_room(self) -> None:
        shared = {key: slot for key, slot in self._slots.items() if not key.owner}
        if len(shared) < self._engines_max:
            return
        idle = [key for key, slot in shared.items() if slot.users == 0 and slot.starting.done()]
        if not idle:
            raise EngineBusy(f"all {self._engines_max} engines are in use (engines_max)")
        oldest = min(idle, key=lambda key: shared[key].used_at)
        log.info("engine_evicted", revision=oldest.revision)
        await self.remove(oldest)

    async def _start(self, key: EngineKey, folder: Callable[[], Awaitable[Path]], settings: EngineSettings) -> Engine:
        began = self._clock.monotonic()
        engine: Engine | None = None
        try:
            engine = await self._open_engine(await folder(), settings)
            await engine.start()
        except BaseException:
            # A failed start leaves no slot behind, so that the next call tries again.
            self._slots.pop(key, None)
            if engine is not None:
                await engine.stop()
            raise
        log.info("engine_started", revision=key.revision, owner=key.owner, seconds=self._clock.monotonic() - began)
        slot = self._slots.get(key)
        if slot is not None:
            slot.watcher = asyncio.create_task(self._watch(key, slot, engine))
        return engine

    async def _watch(self, key: EngineKey, slot: _Slot, engine: Engine) -> None:
        """Takes a dead engine out, so that the next call starts a new one."""
        failure = await engine.wait_failed()
        log.error("engine_failed", revision=key.revision, owner=key.owner, error=str(failure))
        if self._slots.get(key) is slot:
            del self._slots[key]
        await engine.stop()

    @staticmethod
    async def _stop(slot: _Slot) -> None:
        if slot.watcher is not None:
            slot.watcher.cancel()
        if not slot.starting.done():
            slot.starting.cancel()
        try:
            engine = await slot.starting
        except (EngineFailed, asyncio.CancelledError):
            return
        await engine.stop()
