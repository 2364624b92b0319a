"""The channel between the scheduler's processes: PostgreSQL's NOTIFY, sent when the transaction commits."""

from pathlib import Path

from chassis.db.pool import Connection
from chassis.db.queries import load_queries

_QUERIES = load_queries(Path(__file__).with_name("queries.sql"))


class NotificationStore:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def notify(self, *topics: str) -> None:
        """Tells of these topics in every scheduler process once the transaction commits."""
        for topic in topics:
            await _QUERIES.notify(self._connection, payload=topic)

    async def ping(self) -> None:
        """Finds out whether the connection still lives."""
        await _QUERIES.ping(self._connection)
