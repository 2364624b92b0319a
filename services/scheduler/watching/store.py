"""The channel between the scheduler's processes: PostgreSQL's NOTIFY, sent when the transaction commits."""

from pathlib import Path

from chassis.db.pool import Connection
from chassis.db.queries import load_queries

# Between the topics of one notification; no topic holds it.
SEPARATOR = "\n"

_QUERIES = load_queries(Path(__file__).with_name("queries.sql"))


class NotificationStore:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def notify(self, *topics: str) -> None:
        """Tells of these topics in every scheduler process once the transaction commits."""
        await _QUERIES.notify(self._connection, payload=SEPARATOR.join(topics))

    async def ping(self) -> None:
        """Finds out whether the connection still lives."""
        await _QUERIES.ping(self._connection)
