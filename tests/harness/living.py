"""A process inside the test's own loop: wired when the block begins, drained when it ends. It knows no service."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from chassis.process import Process
from chassis.settings import ChassisSettings


async def nothing(process: Process) -> None:
    """The wiring of a process that has no main of its own."""


@asynccontextmanager
async def living(
    settings: ChassisSettings, wire: Callable[[Process], Awaitable[None]] = nothing
) -> AsyncIterator[Process]:
    """The process, once `wire` has returned; its failure fails the test."""
    process, wired = Process(settings), asyncio.Event()

    async def main(process: Process) -> None:
        try:
            await wire(process)
        finally:
            wired.set()

    life = asyncio.create_task(process.live(main))
    await wired.wait()
    try:
        if process.failure is None:
            yield process
    finally:
        process.stop()
        await life
    if process.failure is not None:
        raise process.failure
