"""The life of a daemon: one TaskGroup, and one ordered drain after the first failure or a signal to stop.

It knows when things stop, not what they are: servers, consumers and pools register themselves.
"""

import asyncio
import contextlib
import contextvars
import enum
import os
import resource
import signal
from collections.abc import Awaitable, Callable

import structlog
import uvloop

from chassis.settings import ChassisSettings
from chassis.telemetry import logs

log = structlog.get_logger()

PRIVATE_UMASK = 0o077

CoroutineFunction = Callable[[], Awaitable[None]]


class DrainStage(enum.IntEnum):
    """The order of a stop: nothing new comes in, what is in finishes, then what it stood on is taken away."""

    NOT_SERVING = 0
    STOP_CONSUMING = 1
    FINISH_CALLS = 2
    RELEASE_LEASES = 3
    CLOSE_BUS = 4
    CLOSE_POOL = 5


class Process:
    """Handed to a service's `main`, which wires everything and returns; the process then lives until it must stop."""

    def __init__(self, settings: ChassisSettings) -> None:
        self.settings = settings
        self.stopping = asyncio.Event()
        self.failure: BaseException | None = None
        self._group: asyncio.TaskGroup | None = None
        self._tasks: dict[DrainStage, list[asyncio.Task[None]]] = {stage: [] for stage in DrainStage}
        self._drains: dict[DrainStage, list[CoroutineFunction]] = {stage: [] for stage in DrainStage}

    def spawn(
        self, name: str, work: CoroutineFunction, *, until: DrainStage = DrainStage.STOP_CONSUMING
    ) -> asyncio.Task[None]:
        """Runs `work` in the background until it returns, or until it is cancelled at the end of the stage `until`.

        An error of it is the failure of the process. It starts without the caller identity, deadline or trace of the
        call that spawns it, because it outlives that call.
        """
        if self._group is None:
            raise RuntimeError("a process spawns only while it runs")
        task = self._group.create_task(self._watched(name, work), name=name, context=contextvars.Context())
        self._tasks[until].append(task)
        task.add_done_callback(self._tasks[until].remove)
        return task

    def on_drain(self, stage: DrainStage, work: CoroutineFunction) -> None:
        """Registers `work` for a stage; the works of one stage run side by side."""
        self._drains[stage].append(work)

    def stop(self) -> None:
        self.stopping.set()

    def fail(self, error: BaseException) -> None:
        """The first failure is kept and stops the process; later ones are its consequences."""
        self.failure = self.failure or error
        self.stopping.set()

    async def live(self, main: Callable[["Process"], Awaitable[None]]) -> None:
        """From wiring to the end of the drain; never raises for a failure, which is in `failure`."""
        async with asyncio.TaskGroup() as self._group:
            # In a task of its own, so that a signal also ends a start that hangs.
            wiring = self._group.create_task(self._watched("main", lambda: main(self)), name="main")
            await self.stopping.wait()
            wiring.cancel()
            await asyncio.wait([wiring])
            for stage in DrainStage:
                await self._drain(stage)
            for tasks in self._tasks.values():
                for task in tasks:
                    task.cancel()

    async def _watched(self, name: str, work: CoroutineFunction) -> None:
        try:
            await work()
        except Exception as error:
            log.error("task_failed", task=name, exc_info=error)
            self.fail(error)

    async def _drain(self, stage: DrainStage) -> None:
        works = self._drains[stage]
        if works:
            log.debug("draining", stage=stage.name)
            await asyncio.gather(*(self._drain_one(stage, work) for work in works))
        tasks = list(self._tasks[stage])
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=self.settings.drain_grace_s)

    async def _drain_one(self, stage: DrainStage, work: CoroutineFunction) -> None:
        try:
            async with asyncio.timeout(self.settings.drain_grace_s):
                await work()
        except Exception as error:
            # The other stages still have to run: a failed goodbye must not keep leases or connections.
            log.error("drain_failed", stage=stage.name, exc_info=error)
            self.fail(error)


def run(main: Callable[[Process], Awaitable[None]], settings: ChassisSettings) -> int:
    """Runs a daemon to its end and gives the exit code: 0 after a clean stop, 1 after any failure.

    What it and its children make in files and folders is readable by its own user alone: most of it is tenants'.
    """
    os.umask(PRIVATE_UMASK)
    logs.configure(settings)
    _allow_files()
    stop_export: Callable[[], None] | None = None
    if settings.otlp_endpoint:
        # Here and not above: only a process that exports pays for importing the exporters.
        from chassis.telemetry.export import start_export  # noqa: PLC0415

        stop_export = start_export(settings.service_name, settings.otlp_endpoint)
    try:
        exit_code: int = uvloop.run(_live_with_signals(main, settings))
        return exit_code
    finally:
        if stop_export is not None:
            stop_export()


def _allow_files() -> None:
    """As many open files as the system lets us have: the limits of connections are ours, and lower."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    # A system that names no most may refuse to hear so.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def _live_with_signals(main: Callable[[Process], Awaitable[None]], settings: ChassisSettings) -> int:
    process = Process(settings)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, process.stop)
    await process.live(main)
    log.info("stopped", failed=process.failure is not None)
    return 1 if process.failure is not None else 0
