"""Bells in this process, by topic. A bell may be lost: whoever waits looks again by itself after a while. Pure."""

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

# Whatever may change the order of the queue, or who could be placed.
QUEUE_TOPIC = "queue"


def job_topic(job_id: str) -> str:
    return f"job:{job_id}"


def node_topic(node: str) -> str:
    return f"node:{node}"


class Bell:
    def __init__(self) -> None:
        self._rung = asyncio.Event()

    def ring(self) -> None:
        self._rung.set()

    async def wait(self, timeout_s: float | None = None) -> None:
        """Returns at the next ring, at once if one came since the last wait, or after the timeout."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._rung.wait()
        except TimeoutError:
            return
        finally:
            self._rung.clear()


class Hub:
    def __init__(self) -> None:
        self._bells: dict[str, set[Bell]] = defaultdict(set)

    @contextmanager
    def listening(self, topic: str) -> Iterator[Bell]:
        bell = Bell()
        self._bells[topic].add(bell)
        try:
            yield bell
        finally:
            self._bells[topic].discard(bell)
            if not self._bells[topic]:
                del self._bells[topic]

    def ring(self, topic: str) -> None:
        for bell in self._bells.get(topic, ()):
            bell.ring()

    def ring_all(self) -> None:
        for topic in list(self._bells):
            self.ring(topic)
