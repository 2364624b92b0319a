"""The processes that render a model's prompts. Not pure: os, sockets.

`python -m services.inference.engines.prompts.render_program DESCRIPTOR MODEL BYTES`. The first process loads the
tokenizer and renders nothing. For each `FORK` that comes through the socket DESCRIPTOR, with another socket, it forks a
worker that answers questions there; `KILL` ends one. So a worker that was killed has a successor in milliseconds, and
all share the tokenizer's memory. The first process ends, and all workers with it, when the socket does. A worker may
take BYTES of memory beyond what it began with.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from formats.prompts.faults import ModelFault, RenderingRefused
from services.inference.engines.prompts.frames import (
    KILL,
    LENGTH,
    ORDER,
    Kind,
    pack_answer,
    pack_ids,
    pack_words,
    unpack_question,
)
from services.inference.engines.prompts.prompt_tokenizer import PromptTokenizer

_WORDS_CHARS_MAX = 500
_PR_SET_PDEATHSIG = 1


def main() -> int:
    descriptor, model_path, memory_bytes_max = sys.argv[1:]
    orders = socket.socket(fileno=int(descriptor))
    # Kept for the one answer: what libraries print goes to standard error.
    told = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        tokenizer = PromptTokenizer.read(Path(model_path))
    except BaseException as error:
        # Whatever the library raises for a broken file, panics of the tokenizer among it.
        told.write(json.dumps({"problem": f"{type(error).__name__}: {str(error)[:_WORDS_CHARS_MAX]}"}) + "\n")
        told.close()
        return 1
    told.write(json.dumps({"problem": None}) + "\n")
    told.close()
    # What is there now stays shared between all workers.
    gc.freeze()
    try:
        _obey(orders, lambda questions: _work(questions, tokenizer, int(memory_bytes_max)))
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


def _work(questions: socket.socket, tokenizer: PromptTokenizer, memory_bytes_max: int) -> None:
    """Answers until the other end is closed, or after something that may have left the library broken."""
    _bound_memory(memory_bytes_max)
    with questions.makefile("rb") as incoming:
        while len(head := incoming.read(LENGTH.size)) == LENGTH.size:
            (length,) = LENGTH.unpack(head)
            answer = answered(incoming.read(length), tokenizer)
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


def answered(body: bytes, tokenizer: PromptTokenizer) -> bytes:
    """As `answer`, whatever goes wrong."""
    try:
        return answer(unpack_question(body), tokenizer)
    except MemoryError:
        return pack_answer(Kind.MEMORY)
    except BaseException as error:
        # A panic of the tokenizer is none of Python's usual exceptions.
        return pack_words(Kind.BROKEN, f"{type(error).__name__}: {str(error)[:_WORDS_CHARS_MAX]}")


def answer(question: dict[str, Any], tokenizer: PromptTokenizer) -> bytes:
    """The packed answer. `ids` are asked for their texts; `text` for tokens, as `messages` are by the chat template."""
    if "ids" in question:
        texts = json.dumps([tokenizer.text_of(token_id) for token_id in question["ids"]])
        return pack_words(Kind.TEXTS, texts)
    try:
        if "messages" in question:
            ids = tokenizer.chat_ids(question["messages"], question["tools"], question["switches"])
        else:
            ids = tokenizer.text_ids(question["text"], opening=question["opening"])
    except RenderingRefused as refusal:
        # The template's own words (a role it does not take, turns that must alternate) help the caller.
        return pack_words(Kind.REFUSED, refusal.words[:_WORDS_CHARS_MAX])
    except ModelFault as fault:
        return pack_words(Kind.REFUSED, str(fault)[:_WORDS_CHARS_MAX])
    except (TypeError, ValueError) as error:
        # Text that is none, such as half of a surrogate pair.
        return pack_words(Kind.REFUSED, str(error)[:_WORDS_CHARS_MAX])
    if len(ids) > question["tokens_max"]:
        return pack_words(Kind.TOO_MANY, str(len(ids)))
    return pack_ids(ids)


if __name__ == "__main__":
    sys.exit(main())
