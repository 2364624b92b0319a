"""Signals in this process, by topic: who wants to hear of what. Pure.

A signal may be lost: whoever waits looks again by itself after a while.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from chassis.rounds import Signal

# Whatever may change the order of the queue, or who could be placed.
QUEUE_TOPIC = "queue"


def job_topic(job_id: str) -> str:
    return f"job:{job_id}"


def node_topic(node: str) -> str:
    return f"node:{node}"


class Hub:
    def __init__(self) -> None:
        self._wakers: dict[str, set[Callable[[], None]]] = defaultdict(set)

    @contextmanager
    def listening(self, topic: str) -> Iterator[Signal]:
        signal = Signal()
        self.call(topic, signal.send)
        try:
            yield signal
        finally:
            self.call_no_more(topic, signal.send)

    def call(self, topic: str, wake: Callable[[], None]) -> None:
        """`wake` is called whenever something changed, until `call_no_more`."""
        self._wakers[topic].add(wake)

    def call_no_more(self, topic: str, wake: Callable[[], None]) -> None:
        self._wakers[topic].discard(wake)
        if not self._wakers[topic]:
            del self._wakers[topic]

    def notify(self, topic: str) -> None:
        for wake in tuple(self._wakers.get(topic, ())):
            wake()

    def notify_all(self) -> None:
        for topic in list(self._wakers):
            self.notify(topic)
