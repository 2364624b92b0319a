"""Asks a program one question, bounded in time, memory and answer. Not pure: processes.

The question goes to its standard input, the answer comes from its standard output. It is killed when it takes too long
and when nobody waits for it any more. It knows no question.
"""

import asyncio
import contextlib
import resource
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import structlog

from chassis.spawn import ENDING_S_MAX, LAST_WORDS_LINES_MAX, Spawned, spawn_module

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class ProgramLimits:
    """What one question may take. `memory_bytes_max` is data of each process; files that are mapped for reading do not
    count, because the kernel takes their memory back when it needs it."""

    seconds_max: float
    memory_bytes_max: int
    answer_bytes_max: int
    ending_s_max: float = ENDING_S_MAX


class ProgramEnded(Exception):
    """It ended without an answer; `last_words` are its last lines on standard error. `exit_code` is negative for a
    signal, None when it was killed here."""

    def __init__(self, problem: str, last_words: list[str], exit_code: int | None = None) -> None:
        super().__init__(problem)
        self.last_words = last_words
        self.exit_code = exit_code


class TookTooLong(ProgramEnded):
    """It was killed when its time was over."""


class TookTooMuch(ProgramEnded):
    """Its memory was over."""


async def ask_program(
    module: str, question: bytes, limits: ProgramLimits, *, environment: Mapping[str, str], name: str
) -> bytes:
    """What it answers. ProgramEnded when it does not; its standard error goes to the log under `name`."""
    process = await spawn_module(module, (), environment=environment, line_bytes_max=limits.answer_bytes_max)
    last_words: deque[str] = deque(maxlen=LAST_WORDS_LINES_MAX)
    try:
        # Set from outside before the question is sent: nothing that costs memory happens before.
        process.limit(resource.RLIMIT_DATA, limits.memory_bytes_max)
        process.limit(resource.RLIMIT_CORE, 0)
        async with asyncio.timeout(limits.seconds_max):
            answer = await _communicate(process, question, limits.answer_bytes_max, name, last_words)
            exit_code = await process.wait()
    except TimeoutError:
        raise TookTooLong(f"it took longer than {limits.seconds_max:g} s", list(last_words)) from None
    finally:
        await process.end(limits.ending_s_max)
    if exit_code == 0:
        return answer
    said = list(last_words)
    log.error(f"{name}_crashed", exit_code=exit_code, last_words="\n".join(said))
    if any("MemoryError" in line or "memory allocation" in line for line in said):
        raise TookTooMuch(f"it took more than {limits.memory_bytes_max} bytes", said, exit_code)
    raise ProgramEnded(f"it ended with {exit_code}", said, exit_code)


async def _communicate(
    process: Spawned, question: bytes, answer_bytes_max: int, name: str, last_words: deque[str]
) -> bytes:
    # A process that ended before it read the question is told apart by its exit code.
    with contextlib.suppress(BrokenPipeError):
        await asyncio.to_thread(process.stdin.write, question)
        process.stdin.close()
    answer, _ = await asyncio.gather(
        _read_at_most(process.stdout, answer_bytes_max), _hear_errors(process, name, last_words)
    )
    return answer


async def _hear_errors(process: Spawned, name: str, last_words: deque[str]) -> None:
    """What it writes goes to the log meanwhile, so that a long one can be watched."""
    async for text in process.error_lines():
        last_words.append(text)
        log.info(f"{name}_output", text=text)


async def _read_at_most(stream: asyncio.StreamReader, bytes_max: int) -> bytes:
    """All of `stream`; what goes beyond the limit is read and dropped, so that the writer can end."""
    kept = bytearray()
    while chunk := await stream.read(64 * 1024):
        kept += chunk[: bytes_max - len(kept)]
    return bytes(kept)
