"""Work beside the steps: one call in a thread of its own. What it raises is raised where its result is asked for."""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


def begin(name: str, work: Callable[[], T]) -> "Future[T]":
    """The thread ends with the process, even in the middle: nobody relies on work whose result was not asked for."""
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
