"""Processes that tokenise chunks of a large file. Not pure: subprocess.

`python -m services.trainer.train.data.tokens.tokenizing_workers` is one of them. It is started by a plain exec. A fork
would inherit the locks of torch's and tokenizers' threads but not the threads. A worker reads chunks from standard
input and ends with it, so none outlives the process that it works for. Pickles go between processes of one program
only; no file of a user or a model is ever read as one.
"""

import contextlib
import os
import pickle
import signal
import struct
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import IO, Any, Self

from services.trainer.train.data.tokens.chunks import Chunk, ChunkResult, ChunkRules, ChunkTokenizer
from services.trainer.train.settings.failures import user_failure

# Chunks read ahead for each worker: one in work, one waiting.
CHUNKS_AHEAD = 2
# As the agent says it of an analysis that ends so (`formats/prompts/render_time.py`).
ENDLESS = "the base model's chat template does not come to an end with one of the conversations"
_LENGTH = struct.Struct("<Q")


class WorkerLost(RuntimeError):
    """A worker is gone without an answer: killed, or out of memory."""


class Workers:
    """`results` come in the order of the chunks, whichever process worked on them. Leaving the context ends the
    processes."""

    def __init__(self, count: int, rules: ChunkRules) -> None:
        self._rules = pickle.dumps(rules)
        self._processes = [_start() for _ in range(count)]
        self._free: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="tokenise")
        self._greeted = [self._threads.submit(self._greet, process) for process in self._processes]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None
    ) -> None:
        # The processes first: a thread that waits for one notices its end.
        for process in self._processes:
            process.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for process in self._processes:
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    # What a killed one had not read yet goes nowhere.
                    with contextlib.suppress(OSError):
                        stream.close()

    def results(self, chunks: Iterable[Chunk]) -> Iterator[ChunkResult]:
        """Takes chunks as workers get free, a few ahead of what was asked for. Raises WorkerLost."""
        ahead: deque[Future[ChunkResult]] = deque()
        for chunk in chunks:
            ahead.append(self._threads.submit(self._work, chunk))
            if len(ahead) == CHUNKS_AHEAD * len(self._processes):
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    def _greet(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdin is not None
        # One that is gone already fails when it is taken for a chunk.
        with contextlib.suppress(OSError):
            _send(process.stdin, self._rules)
        self._free.put(process)

    def _work(self, chunk: Chunk) -> ChunkResult:
        process = self._free.get()
        try:
            answer = _asked(process, chunk)
        finally:
            self._free.put(process)
        if isinstance(answer, BaseException):
            raise answer
        assert isinstance(answer, ChunkResult)
        return answer


def _start() -> "subprocess.Popen[bytes]":
    root = str(Path(__file__).resolve().parents[5])
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {
        **os.environ,
        # A warm child has left the folder that it was started in, where `-m` found this package.
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        # One thread each: they are as many as there are cores for them.
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "services.trainer.train.data.tokens.tokenizing_workers"]
    try:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    except OSError as error:
        raise WorkerLost(f"a process that tokenises cannot be started: {error}") from error


def _asked(process: "subprocess.Popen[bytes]", chunk: Chunk) -> Any:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        _send(process.stdin, pickle.dumps(chunk))
        answer = _receive(process.stdout)
    except (OSError, ValueError, EOFError) as error:
        raise WorkerLost(f"a process that tokenises is gone ({error})") from error
    if answer is None and process.wait() == -signal.SIGPROF:
        raise user_failure("MODEL_INVALID", ENDLESS)
    if answer is None:
        raise WorkerLost("a process that tokenises ended without an answer")
    return pickle.loads(answer)  # noqa: S301 - written by our own child


def _send(stream: IO[bytes], message: bytes) -> None:
    stream.write(_LENGTH.pack(len(message)))
    stream.write(message)
    stream.flush()


def _receive(stream: IO[bytes]) -> bytes | None:
    """None at the end of the stream."""
    header = stream.read(_LENGTH.size)
    if not header:
        return None
    (length,) = _LENGTH.unpack(header)
    message = stream.read(length)
    if len(message) < length:
        raise EOFError("it was cut off in the middle of an answer")
    return message


def main() -> int:
    # On Ctrl-C the whole group hears SIGINT; the end of standard input is what ends a worker.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # What a library prints must not come between the answers.
    os.dup2(2, 1)
    rules = _receive(requests)
    if rules is None:
        return 0
    tokenizer = ChunkTokenizer(pickle.loads(rules))  # noqa: S301 - written by the process that started this one
    while (message := _receive(requests)) is not None:
        answer: ChunkResult | MemoryError | RuntimeError
        try:
            answer = tokenizer(pickle.loads(message))  # noqa: S301
        except MemoryError as error:
            answer = MemoryError(f"in a process that tokenises: {error}")
        except Exception as error:
            traceback.print_exc()
            answer = RuntimeError(f"a process that tokenises failed: {type(error).__name__}: {error}")
        try:
            _send(answers, pickle.dumps(answer))
        except BrokenPipeError:
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
