"""Signals in this process, by topic: who wants to hear of what. Pure.

A signal may be lost: whoever waits looks again by itself after a while.
"""

from collections import defaultdict
from collections.abc import Iterator
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
        self._signals: dict[str, set[Signal]] = defaultdict(set)

    @contextmanager
    def listening(self, topic: str) -> Iterator[Signal]:
        signal = Signal()
        self._signals[topic].add(signal)
        try:
            yield signal
        finally:
            self._signals[topic].discard(signal)
            if not self._signals[topic]:
                del self._signals[topic]

    def notify(self, topic: str) -> None:
        for signal in self._signals.get(topic, ()):
            signal.send()

    def notify_all(self) -> None:
        for topic in list(self._signals):
            self.notify(topic)
