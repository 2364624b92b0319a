"""Work beside the steps: one call in a thread of its own. Its exception is raised where its result is asked for."""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


def begin(name: str, work: Callable[[], T]) -> "Future[T]":
    """Starts the call. Its thread ends with the process, even in the middle, so only a result that was asked for can be
    relied on."""
    future: Future[T] = Future()

    def do() -> None:
        try:
            result = work()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    Thread(target=do, name=name, daemon=True).start()
    return future
