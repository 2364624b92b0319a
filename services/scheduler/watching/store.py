"""The channel between the scheduler's processes: PostgreSQL's NOTIFY, sent when the transaction commits."""

from collections.abc import Collection, Iterator
from pathlib import Path

from chassis.db.pool import Connection
from chassis.db.queries import load_queries

# Between the topics of one notification; no topic holds it.
SEPARATOR = "\n"
# PostgreSQL takes less than 8,000 in one.
PAYLOAD_BYTES_MAX = 7_900

_QUERIES = load_queries(Path(__file__).with_name("queries.sql"))


class NotificationStore:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def notify(self, topics: Collection[str]) -> None:
        """Tells of these topics in every scheduler process once the transaction commits."""
        for payload in payloads(topics):
            await _QUERIES.notify(self._connection, payload=payload)

    async def ping(self) -> None:
        """Finds out whether the connection still lives."""
        await _QUERIES.ping(self._connection)


async def notify(connection: Connection, topics: Collection[str]) -> None:
    """What a Database is given to ring with."""
    await NotificationStore(connection).notify(topics)


def payloads(topics: Collection[str]) -> Iterator[str]:
    """The topics in as few notifications as they fit in."""
    payload = ""
    for topic in topics:
        longer = f"{payload}{SEPARATOR}{topic}" if payload else topic
        if len(longer.encode()) > PAYLOAD_BYTES_MAX:
            yield payload
            longer = topic
        payload = longer
    if payload:
        yield payload
