"""Does to a mesh what a plan says: kills, freezes, cuts off, silences, sets clocks; and heals it. Not pure: signals."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import asyncpg
import psutil

from deploy.local.table import POSTGRES
from tests.harness.links import LinkState
from tests.storm import database_clock
from tests.storm.plan import Fault, Trouble
from tests.storm.storm_mesh import StormMesh, clock_names, process_names

STATES = {Trouble.CUT: LinkState.CUT, Trouble.SILENCE: LinkState.SILENT}
HEALTHY_S_MAX = 60.0


async def disturb(mesh: StormMesh, fault: Fault, began_s: float) -> None:
    """One fault at its time, and its end; a process that does not run at that moment is left alone."""
    await asyncio.sleep(max(0.0, began_s + fault.at_s - time.monotonic()))
    match fault.trouble:
        case Trouble.KILL:
            with suppress(ProcessLookupError):
                mesh.killed[fault.target].add(await mesh.stack.kill(fault.target))
        case Trouble.FREEZE:
            frozen = signal_tree(mesh, fault.target, psutil.Process.suspend)
            await asyncio.sleep(fault.lasts_s)
            # Those that were frozen, and not the tree as it is now: a kill meanwhile leaves them without a parent, and
            # PostgreSQL does not start beside children of an earlier start.
            for one in frozen:
                with suppress(psutil.Error):
                    one.resume()
        case Trouble.CUT | Trouble.SILENCE:
            mesh.links[fault.target].become(STATES[fault.trouble])
            await asyncio.sleep(fault.lasts_s)
            mesh.links[fault.target].become(LinkState.OPEN)
        case Trouble.CLOCK:
            await set_clock(mesh, fault.target, fault.shift_s)
            await asyncio.sleep(fault.lasts_s)
            await set_clock(mesh, fault.target, 0.0)


async def heal(mesh: StormMesh) -> None:
    """Nothing is frozen, cut off or wrong about the time any more, and every process is healthy."""
    for process in process_names():
        signal_tree(mesh, process, psutil.Process.resume)
    for link in mesh.links.values():
        link.become(LinkState.OPEN)
    await mesh.stack.wait_healthy(timeout_s=HEALTHY_S_MAX)
    for process in clock_names():
        await set_clock(mesh, process, 0.0)


async def set_clock(mesh: StormMesh, process: str, shift_s: float) -> None:
    if process != POSTGRES:
        mesh.clock(process).write_text(str(shift_s))
        return
    # A database that is away, frozen or starting has no clock to be set: the plan's other faults had the better of it.
    with suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError):
        async with asyncio.timeout(HEALTHY_S_MAX if shift_s == 0 else 1.0):
            await database_clock.shift(mesh, shift_s)


def signal_tree(mesh: StormMesh, process: str, send: Callable[[psutil.Process], None]) -> list[psutil.Process]:
    """A process first, so that it starts nothing more, and then whatever it started; gives those that were there."""
    reached = []
    for one in tree(mesh.stack.pid(process)):
        with suppress(psutil.Error):
            send(one)
            reached.append(one)
    return reached


def tree(pid: int | None) -> Iterator[psutil.Process]:
    with suppress(psutil.Error):
        if pid is not None:
            root = psutil.Process(pid)
            yield root
            yield from root.children(recursive=True)
