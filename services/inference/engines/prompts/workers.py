"""Keeps the processes that work on a stranger's texts: render prompts, read answers. Not pure: processes, sockets.

Each question is answered within its time, or its process is killed. It refuses to know what is asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path

import structlog

from chassis.spawn import ENDING_S_MAX, Spawned, harmless_environment, spawn_module
from services.inference.engines.base import EngineFailed, PromptFailed, PromptTooCostly
from services.inference.engines.prompts.frames import FORK, HEAD, KILL, ORDER, Kind

log = structlog.get_logger()

RENDER_PROGRAM = "services.inference.engines.prompts.render_program"
_LINE_BYTES_MAX = 1 << 16
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_OFFLINE": "1",
    # The first process forks, so it must not have threads.
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


@dataclass(frozen=True, kw_only=True)
class WorkerLimits:
    """Of `count` workers all but one may be busy with long questions; with a single one, it may."""

    count: int
    memory_bytes_max: int
    load_s_max: float


class Workers:
    """`start`, then `ask`, then `stop`. A worker that is killed is replaced; when the process that forks them has died,
    the next question starts another one."""

    def __init__(
        self, model_path: Path, limits: WorkerLimits, *, program: str = RENDER_PROGRAM, arguments: tuple[str, ...] = ()
    ) -> None:
        """`arguments` follow those that every such program has."""
        self._model_path = model_path
        self._program = program
        self._arguments = arguments
        self._limits = limits
        self._long = asyncio.Semaphore(max(1, limits.count - 1))
        self._free: asyncio.Queue[_Worker] = asyncio.Queue()
        self._numbers = itertools.count()
        self._leader: Spawned | None = None
        self._orders: socket.socket | None = None
        self._listener: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._stopped = False

    async def start(self) -> None:
        """EngineFailed when the folder has no tokenizer that loads in time and without code of its own."""
        async with self._starting:
            if self._stopped:
                raise EngineFailed("the engine was stopped")
            if self._orders is None:
                await self._start()

    async def ask(
        self, question: bytes, seconds_max: float, *, is_long: bool, answer_bytes_max: int
    ) -> tuple[Kind, bytes]:
        """PromptTooCostly when it took too long, PromptFailed when the worker died of it. Whoever leaves before the
        answer leaves no work behind."""
        async with self._long if is_long else contextlib.nullcontext():
            while True:
                worker = await self._worker()
                try:
                    async with asyncio.timeout(seconds_max):
                        kind, body = await worker.exchange(question, answer_bytes_max)
                except TimeoutError:
                    self._replace(worker)
                    raise PromptTooCostly(f"{seconds_max:g} s") from None
                except (EOFError, OSError, ValueError) as error:
                    if not self._replace(worker):
                        # The first process died, and this one only with it.
                        continue
                    raise PromptFailed("the process that rendered the prompt died of it") from error
                except BaseException:
                    self._replace(worker)
                    raise
                if kind < Kind.BROKEN:
                    self._free.put_nowait(worker)
                else:
                    self._replace(worker)
                return kind, body

    async def stop(self) -> None:
        """Ends all processes. Any number of times."""
        self._stopped = True
        self._forget_leader()
        leader, self._leader = self._leader, None
        if leader is not None:
            await leader.end(ENDING_S_MAX)

    async def _worker(self) -> _Worker:
        """A free one of the processes that are there now."""
        while True:
            try:
                await self.start()
            except EngineFailed:
                # Whoever else waits tries for itself.
                self._wake_one()
                raise
            worker = await self._free.get()
            if worker.orders is not self._orders:
                worker.close()
            elif worker.has_died():
                # While it had nothing to do: no question is to blame.
                self._replace(worker)
            else:
                return worker

    async def _start(self) -> None:
        if self._leader is not None:
            await self._leader.end(ENDING_S_MAX)
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._leader = await self._spawn(theirs.fileno())
            self._listener = asyncio.create_task(_hear(self._leader))
            problem = await self._loading_problem(self._leader)
            if problem is not None:
                raise EngineFailed(f"the tokenizer of {self._model_path.name} cannot be loaded: {problem}")
        except BaseException:
            ours.close()
            raise
        ours.setblocking(False)
        self._orders = ours
        for _ in range(self._limits.count):
            self._fork(ours)

    async def _spawn(self, descriptor: int) -> Spawned:
        arguments = (str(descriptor), str(self._model_path), str(self._limits.memory_bytes_max), *self._arguments)
        seen = harmless_environment(os.environ) | _ENVIRONMENT
        return await spawn_module(
            self._program, arguments, environment=seen, line_bytes_max=_LINE_BYTES_MAX, pass_fds=(descriptor,)
        )

    async def _loading_problem(self, leader: Spawned) -> str | None:
        try:
            async with asyncio.timeout(self._limits.load_s_max):
                told = await leader.stdout.readline()
        except TimeoutError:
            await leader.end(ENDING_S_MAX)
            return f"it took longer than {self._limits.load_s_max:g} s"
        if not told.endswith(b"\n"):
            return "it ended the process that loads it"
        problem: str | None = json.loads(told)["problem"]
        return problem

    def _fork(self, orders: socket.socket) -> bool:
        """A new worker, whose questions wait in its socket until it is there. False when nobody forks any more."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        number = next(self._numbers)
        with theirs:
            try:
                socket.send_fds(orders, [ORDER.pack(FORK, number)], [theirs.fileno()])
            except OSError:
                ours.close()
                self._forget_leader()
                return False
        self._free.put_nowait(_Worker(number, ours, orders))
        return True

    def _replace(self, worker: _Worker) -> bool:
        """Kills it; False when the process that would, and would fork another one, is gone."""
        worker.close()
        if self._orders is None or worker.orders is not self._orders:
            return False
        log.warning("prompt_worker_replaced", model=self._model_path.name)
        try:
            self._orders.send(ORDER.pack(KILL, worker.number))
        except OSError:
            self._forget_leader()
            return False
        return self._fork(self._orders)

    def _forget_leader(self) -> None:
        orders, self._orders = self._orders, None
        if orders is not None:
            # It ends with this, if it is there at all.
            orders.close()
        self._wake_one()

    def _wake_one(self) -> None:
        """Somebody who waits for a worker of processes that are gone looks again."""
        self._free.put_nowait(_Worker(-1, None, object()))


class _Worker:
    """Our end of one worker, and the process that forked it, by the socket of its orders."""

    def __init__(self, number: int, questions: socket.socket | None, orders: object) -> None:
        self.number = number
        self.orders = orders
        self._questions = questions

    async def exchange(self, question: bytes, answer_bytes_max: int) -> tuple[Kind, bytes]:
        """EOFError when it died, ValueError for what is no answer."""
        assert self._questions is not None
        await asyncio.get_running_loop().sock_sendall(self._questions, question)
        kind, length = HEAD.unpack(await self._read(HEAD.size))
        if length > answer_bytes_max:
            raise ValueError(f"an answer of {length} bytes")
        return Kind(kind), await self._read(length)

    def has_died(self) -> bool:
        """Of a worker that has no question: there is nothing to read then but the end."""
        assert self._questions is not None
        try:
            self._questions.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    async def _read(self, length: int) -> bytes:
        assert self._questions is not None
        read = bytearray()
        while len(read) < length:
            part = await asyncio.get_running_loop().sock_recv(self._questions, length - len(read))
            if not part:
                raise EOFError("the worker is gone")
            read += part
        return bytes(read)

    def close(self) -> None:
        if self._questions is not None:
            self._questions.close()


async def _hear(leader: Spawned) -> None:
    async for text in leader.error_lines():
        log.info("prompt_worker_output", text=text)
