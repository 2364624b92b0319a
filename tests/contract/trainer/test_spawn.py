"""What a started process must leave alone: the numbers of files that somebody else has opened meanwhile."""

import asyncio
import gc
import os
import threading
import time

import uvloop

from chassis.spawn import harmless_environment, spawn_module

ROUNDS = 40


def test_the_end_of_a_process_closes_no_file_of_another_thread() -> None:
    """Under the loop of the real agent: a number that is closed twice hits whoever opened a file in between."""
    stop = threading.Event()
    lost: list[int] = []
    threads = [threading.Thread(target=open_and_close, args=(stop, lost)) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        uvloop.run(spawn_repeatedly())
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert lost == []


async def spawn_repeatedly() -> None:
    for _ in range(ROUNDS):
        process = await spawn_module("this", [], environment=harmless_environment(os.environ), line_bytes_max=1 << 16)
        assert (await process.stdout.read()).startswith(b"The Zen of Python")
        assert await process.stderr.read() == b""
        assert await process.wait() == 0
        process.close()
        process.close()
        del process
        # One turn of the loop, in which transports close.
        await asyncio.sleep(0)
        gc.collect()


def open_and_close(stop: threading.Event, lost: list[int]) -> None:
    while not stop.is_set():
        opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(5)]
        time.sleep(0.0002)
        for descriptor in opened:
            try:
                os.close(descriptor)
            except OSError:
                lost.append(descriptor)
