"""Price books that have been in force. It decides nothing."""

from datetime import date
from pathlib import Path

from chassis.db.pool import Connection
from chassis.db.queries import load_queries

_queries = load_queries(Path(__file__).parent / "queries.sql")


class PriceStore:
    """The texts of price books, by version."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def list_books(self) -> dict[str, str]:
        """Version -> YAML text."""
        return {row["version"]: row["source"] async for row in _queries.list_price_books(self._connection)}

    async def insert(self, *, version: str, book: str, source: str) -> None:
        await _queries.insert_price_book(self._connection, version=version, book=book, source=source)

    async def get_last_priced_day(self, version: str) -> date | None:
        """The last day of use that was priced by this version because it was in force."""
        day: date | None = await _queries.get_last_priced_day(self._connection, version=version)
        return day
