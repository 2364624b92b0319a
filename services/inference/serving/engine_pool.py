"""Keeps the engines in memory, started on first use. Not pure: engines.

There is one per base model, per fully tuned model and per dedicated endpoint. It knows how engines live and die; it
knows no tenant, no price and no message of the wire.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from contextvars import Context
from dataclasses import dataclass, field, replace
from pathlib import Path

import structlog

from chassis.clock import Clock
from services.inference.engines.base import Engine, EngineBusy, EngineFailed, EngineSettings
from services.inference.serving.shared_devices import SharedDevices

log = structlog.get_logger()

Opener = Callable[[Path, EngineSettings], Awaitable[Engine]]
# The folder of an engine's weights, for as long as the engine has memory.
Folder = Callable[[], AbstractAsyncContextManager[Path]]


@dataclass(frozen=True, kw_only=True)
class EngineKey:
    """What an engine serves: a revision of weights for everybody, or one endpoint under one lease, its `owner`."""

    revision: str = ""
    owner: str = ""


@dataclass(kw_only=True, eq=False)
class _Slot:
    """One engine with its users. `starting` is shared by everybody who waits for it."""

    starting: asyncio.Task[Engine]
    # What the engine stands on, weights and devices, given back after its stop.
    ground: AsyncExitStack
    engine: Engine | None = None
    users: int = 0
    used_at: float = 0.0
    watcher: asyncio.Task[None] | None = field(default=None)


class EnginePool:
    """At most `engines_max` shared engines have memory at a time, those that are stopping included; the longest unused
    one makes room. Engines of endpoints are counted apart: their devices are their own."""

    def __init__(
        self, *, open_engine: Opener, engines_max: int, clock: Clock, devices: SharedDevices | None = None
    ) -> None:
        """Without `devices` no shared engine has any, whatever it computes on."""
        self._open_engine = open_engine
        self._devices = devices
        self._engines_max = engines_max
        self._clock = clock
        self._slots: dict[EngineKey, _Slot] = {}
        # Until when the devices of an engine are certainly its own; none for one that has no lease.
        self._until_s: dict[EngineKey, float] = {}
        # One at a time decides who makes room for whom.
        self._making_room = asyncio.Lock()
        self._stopping: dict[asyncio.Task[None], EngineKey] = {}
        self._closed = False

    @asynccontextmanager
    async def use(self, key: EngineKey, folder: Folder, settings: EngineSettings) -> AsyncIterator[Engine]:
        """A started engine for the length of the block. A shared one is started on first use; that of an endpoint only
        by `start`. EngineFailed when it cannot start or is not there, EngineBusy when there is no room for it."""
        slot = self._slots.get(key) or await self._add_shared(key, folder, settings)
        slot.users += 1
        try:
            yield await _started(slot)
        finally:
            slot.users -= 1
            slot.used_at = self._clock.monotonic()

    async def start(self, key: EngineKey, folder: Folder, settings: EngineSettings) -> None:
        """Starts the engine of an endpoint, once; returns when it runs."""
        await _started(self._slots.get(key) or self._add(key, folder, settings))

    def serve_until(self, key: EngineKey, until_s: float) -> None:
        """Until when the devices of this engine, also one that is not started yet, are certainly its own."""
        self._until_s[key] = until_s
        slot = self._slots.get(key)
        if slot is not None and slot.engine is not None:
            slot.engine.serve_until(until_s)

    def idle_s(self, key: EngineKey) -> float:
        """For how long nobody has used an engine that runs; 0 while somebody does."""
        slot = self._slots.get(key)
        if slot is None or slot.users or not slot.starting.done():
            return 0.0
        return self._clock.monotonic() - slot.used_at

    def retire(self, key: EngineKey) -> None:
        """Takes an engine out of the table at once; its memory is taken until its stop ends."""
        self._until_s.pop(key, None)
        slot = self._slots.pop(key, None)
        if slot is not None:
            task = asyncio.create_task(self._stop(key, slot), context=Context())
            self._stopping[task] = key
            task.add_done_callback(self._stopping.pop)

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
        """Stops an engine, also one that is starting, and returns when its memory is free; fine when there is none."""
        self.retire(key)
        if tasks := [task for task, stopping in self._stopping.items() if stopping == key]:
            await asyncio.wait(tasks)

    async def close(self) -> None:
        """Stops every engine, and starts none any more."""
        self._closed = True
        for key in list(self._slots):
            self.retire(key)
        if self._stopping:
            await asyncio.wait(list(self._stopping))

    async def _add_shared(self, key: EngineKey, folder: Folder, settings: EngineSettings) -> _Slot:
        if key.owner:
            raise EngineFailed("the engine of this endpoint was stopped")
        async with self._making_room:
            # Somebody else may have added the same engine while this one waited for its turn.
            if key not in self._slots:
                await self._make_room()
                self._add(key, folder, settings)
            return self._slots[key]

    def _add(self, key: EngineKey, folder: Folder, settings: EngineSettings) -> _Slot:
        if self._closed:
            raise EngineFailed("this process stops")
        ground = AsyncExitStack()
        task = asyncio.create_task(
            self._start(key, folder, settings, ground), name=f"engine-{key.revision or key.owner}", context=Context()
        )
        slot = self._slots[key] = _Slot(starting=task, ground=ground, used_at=self._clock.monotonic())
        task.add_done_callback(lambda _: self._watch_start(key, slot))
        return slot

    async def _make_room(self) -> None:
        while True:
            shared = {key: slot for key, slot in self._slots.items() if not key.owner}
            stopping = [task for task, key in self._stopping.items() if not key.owner]
            if len(shared) + len(stopping) < self._engines_max:
                return
            if stopping:
                await asyncio.wait(stopping, return_when=asyncio.FIRST_COMPLETED)
                continue
            idle = [key for key, slot in shared.items() if slot.users == 0 and slot.starting.done()]
            if not idle:
                raise EngineBusy(f"all {self._engines_max} engines are in use (engines_max)")
            oldest = min(idle, key=lambda key: shared[key].used_at)
            log.info("engine_evicted", revision=oldest.revision)
            self.retire(oldest)

    async def _start(self, key: EngineKey, folder: Folder, settings: EngineSettings, ground: AsyncExitStack) -> Engine:
        began = self._clock.monotonic()
        engine: Engine | None = None
        try:
            path = await ground.enter_async_context(folder())
            engine = await self._open_engine(path, settings)
            if engine.on_gpus and not key.owner and self._devices is not None:
                held = self._devices.held(key.revision, _Tenant(self, key))
                indices = await ground.enter_async_context(held)
                engine = await self._open_engine(path, replace(settings, gpu_indices=indices))
            if (slot := self._slots.get(key)) is not None:
                slot.engine = engine
            if (until_s := self._until_s.get(key)) is not None:
                engine.serve_until(until_s)
            await engine.start()
        except BaseException:
            async with ground:
                if engine is not None:
                    await engine.stop()
            raise
        log.info("engine_started", revision=key.revision, owner=key.owner, seconds=self._clock.monotonic() - began)
        return engine

    def _watch_start(self, key: EngineKey, slot: _Slot) -> None:
        """A failed start leaves no slot behind, so that the next call tries again; a started engine is watched."""
        if self._slots.get(key) is not slot:
            return
        if slot.starting.cancelled() or slot.starting.exception() is not None:
            del self._slots[key]
        else:
            slot.watcher = asyncio.create_task(self._watch(key, slot, slot.starting.result()), context=Context())

    async def _watch(self, key: EngineKey, slot: _Slot, engine: Engine) -> None:
        """Takes a dead engine out, so that the next call starts a new one."""
        failure = await engine.wait_failed()
        log.error("engine_failed", revision=key.revision, owner=key.owner, error=str(failure))
        if self._slots.get(key) is slot:
            self.retire(key)

    @staticmethod
    async def _stop(key: EngineKey, slot: _Slot) -> None:
        if slot.watcher is not None:
            slot.watcher.cancel()
        if not slot.starting.done():
            slot.starting.cancel()
        await asyncio.wait([slot.starting])
        if slot.starting.cancelled() or slot.starting.exception() is not None:
            return
        try:
            async with slot.ground:
                await slot.starting.result().stop()
        except Exception as error:
            log.error("engine_stop_failed", revision=key.revision, owner=key.owner, exc_info=error)


@dataclass(frozen=True)
class _Tenant:
    """One shared engine as those who keep its devices see it."""

    pool: EnginePool
    key: EngineKey

    def serve_until(self, until_s: float) -> None:
        self.pool.serve_until(self.key, until_s)

    def idle_s(self) -> float:
        return self.pool.idle_s(self.key)

    def end(self) -> None:
        self.pool.retire(self.key)


async def _started(slot: _Slot) -> Engine:
    """The engine once it runs; the start goes on for the others when one caller gives up."""
    await asyncio.wait([slot.starting])
    if slot.starting.cancelled():
        raise EngineFailed("the engine was stopped while it started")
    return slot.starting.result()
