"""Keeps a child with loaded libraries waiting for each device that nothing runs on. Not pure: processes.

Loading torch, transformers and peft is most of the time from a lease to the first step of a small job. A warm child is
used once and replaced after the attempt. Whatever goes wrong here costs that time and nothing else: the attempt then
starts a child of its own. It knows no job.
"""

import asyncio
import contextlib
import resource
from collections.abc import Mapping
from pathlib import Path

import structlog

from services.trainer.child.training_child import Child, ChildProtocolError, ChildStuckError
from services.trainer.config import TrainerSettings
from services.trainer.node.devices import LocalDevice

log = structlog.get_logger()


class WarmChildren:
    """`fill` a device that is free, `take` its child for an attempt, `close` at the end.

    None of them raises for a child that cannot be had.
    """

    def __init__(self, settings: TrainerSettings, devices: Mapping[int, LocalDevice]) -> None:
        self._settings = settings
        self._devices = devices
        self._waiting: dict[int, asyncio.Task[Child | None]] = {}
        self._memory_bytes: dict[int, int] = {}

    def fill(self, index: int) -> None:
        """Begins to warm a child for this device, unless there is one or the settings want none."""
        if self._settings.warm_memory_bytes_max and index in self._devices and index not in self._waiting:
            self._waiting[index] = asyncio.create_task(self._warm(self._devices[index]))

    async def take(self, index: int, workdir: Path, job_id: str) -> Child | None:
        """The device's child, which has been given its work; None when there is none.

        One that is still loading is waited for: a new one would load as long.
        """
        warming = self._waiting.pop(index, None)
        if warming is None:
            return None
        try:
            child = await asyncio.shield(warming)
        except asyncio.CancelledError:
            await _end(warming)
            raise
        finally:
            self._memory_bytes.pop(index, None)
        if child is None:
            return None
        try:
            child.begin(workdir, job_id)
        except OSError:
            log.warning("warm_child_gone", child=child.pid, last_words=child.last_words)
            await _kill(child)
            return None
        return child

    async def close(self) -> None:
        """Ends every waiting child."""
        waiting, self._waiting = list(self._waiting.values()), {}
        await asyncio.gather(*(_end(warming) for warming in waiting))

    async def _warm(self, device: LocalDevice) -> Child | None:
        try:
            child = await self._start(device)
        except OSError as error:
            log.warning("warm_child_not_kept", device=device.index, error=str(error))
            return None
        try:
            if await self._is_ready(child) and self._has_room(device.index, child.pid):
                log.info("warm_child_ready", device=device.index, child=child.pid)
                return child
        except asyncio.CancelledError:
            await _kill(child)
            raise
        await _kill(child)
        log.warning("warm_child_not_kept", device=device.index, last_words=child.last_words)
        return None

    async def _start(self, device: LocalDevice) -> Child:
        settings = self._settings
        return await Child.start(
            settings.child_module,
            None,
            job_id="",
            threads=settings.threads_per_child,
            gpu_uuid=device.uuid,
            line_bytes_max=settings.child_line_bytes_max,
            ending_s_max=settings.child_ending_s_max,
        )

    async def _is_ready(self, child: Child) -> bool:
        try:
            async with asyncio.timeout(self._settings.warm_start_s_max):
                first = await anext(aiter(child.events()), None)
        except (ChildProtocolError, TimeoutError):
            return False
        return first is not None and first["type"] == "ready"

    def _has_room(self, index: int, pid: int) -> bool:
        """Counts what the child holds against what all waiting ones together may hold."""
        self._memory_bytes[index] = resident_bytes(pid)
        held = sum(self._memory_bytes.values())
        if held <= self._settings.warm_memory_bytes_max:
            return True
        del self._memory_bytes[index]
        log.warning("warm_children_over_memory_limit", bytes=held, limit=self._settings.warm_memory_bytes_max)
        return False


async def _end(warming: asyncio.Task[Child | None]) -> None:
    warming.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        child = await warming
        if child is not None:
            await _kill(child)


async def _kill(child: Child) -> None:
    child.kill()
    with contextlib.suppress(ChildStuckError):
        await child.wait()


def resident_bytes(pid: int) -> int:
    """What a process holds in memory now; 0 where the system does not say, or the process is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        return 0
