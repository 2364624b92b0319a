"""The first process of those that work on a stranger's texts: it loads once, and forks workers. Not pure: os, sockets.

For each `FORK` that comes through the socket DESCRIPTOR, with another socket, it forks a worker that answers questions
there; `KILL` ends one. So a worker that was killed has a successor in milliseconds, and all share what was loaded. The
first process ends, and all workers with it, when the socket does. A worker may take BYTES of memory beyond what it
began with. It refuses to know what is loaded and asked.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from services.inference.engines.prompts.frames import KILL, LENGTH, ORDER, Kind

Loaded = TypeVar("Loaded")

_WORDS_CHARS_MAX = 500
_PR_SET_PDEATHSIG = 1


def lead(arguments: Sequence[str], load: Callable[[str], Loaded], answered: Callable[[bytes, Loaded], bytes]) -> int:
    """DESCRIPTOR, what is loaded, BYTES. Tells in one line of JSON whether it could be loaded."""
    descriptor, model_path, memory_bytes_max = arguments
    orders = socket.socket(fileno=int(descriptor))
    # Kept for the one answer: what libraries print goes to standard error.
    told = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        loaded = load(model_path)
    except BaseException as error:
        # Whatever a library raises for a broken file, panics of the tokenizer among it.
        told.write(json.dumps({"problem": f"{type(error).__name__}: {str(error)[:_WORDS_CHARS_MAX]}"}) + "\n")
        told.close()
        return 1
    told.write(json.dumps({"problem": None}) + "\n")
    told.close()
    # What is there now stays shared between all workers.
    gc.freeze()
    try:
        _obey(orders, lambda questions: _work(questions, lambda body: answered(body, loaded), int(memory_bytes_max)))
    finally:
        # The leader of its group: nothing of it stays.
        os.killpg(0, signal.SIGKILL)
    return 0


def _obey(orders: socket.socket, work: Callable[[socket.socket], None]) -> None:
    """Until the other end is closed."""
    workers: dict[int, int] = {}
    while True:
        order, descriptors, _, _ = socket.recv_fds(orders, ORDER.size, 1)
        if len(order) < ORDER.size:
            return
        what, number = ORDER.unpack(order)
        if what == KILL:
            # Not reaped before: until then nobody else can have its id.
            pid = workers.pop(number)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            continue
        questions = socket.socket(fileno=descriptors[0])
        leader = os.getpid()
        workers[number] = os.fork()
        if workers[number] == 0:
            orders.close()
            _die_with(leader)
            with contextlib.suppress(OSError):
                work(questions)
            os._exit(0)
        questions.close()


def _die_with(leader: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != leader:
            os._exit(1)


def _work(questions: socket.socket, answered: Callable[[bytes], bytes], memory_bytes_max: int) -> None:
    """Answers until the other end is closed, or after something that may have left the library broken."""
    _bound_memory(memory_bytes_max)
    with questions.makefile("rb") as incoming:
        while len(head := incoming.read(LENGTH.size)) == LENGTH.size:
            (length,) = LENGTH.unpack(head)
            answer = answered(incoming.read(length))
            questions.sendall(answer)
            if answer[0] >= Kind.BROKEN:
                return


def _bound_memory(memory_bytes_max: int) -> None:
    if sys.platform != "linux":
        return
    with open("/proc/self/status", encoding="ascii") as status:
        data_kib = next(int(line.split()[1]) for line in status if line.startswith("VmData:"))
    bytes_max = data_kib * 1024 + memory_bytes_max
    resource.setrlimit(resource.RLIMIT_DATA, (bytes_max, bytes_max))
