"""Reads and writes what billing said of credit and caps. It decides nothing."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from chassis.db.pool import Connection
from chassis.db.queries import affected, load_queries
from services.inference.spending.states import CapState, CreditState

QUERIES = load_queries(Path(__file__).parent / "queries.sql")


class SpendingStore:
    """Credit and cap states over one connection, inside the caller's transaction if there is one."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def save_credit(self, state: CreditState, now: datetime) -> bool:
        """False when something later is known."""
        return affected(await QUERIES.save_credit_state(self._connection, **vars(state), now=now)) == 1

    async def save_cap(self, state: CapState, now: datetime) -> bool:
        """False when something later is known."""
        return affected(await QUERIES.save_cap_state(self._connection, **vars(state), now=now)) == 1

    async def list_since(self, since: datetime) -> list[CreditState | CapState]:
        """What was stored of credit and caps since a moment."""
        credit = [CreditState(**row) async for row in QUERIES.list_credit_states(self._connection, since=since)]
        caps = [CapState(**row) async for row in QUERIES.list_cap_states(self._connection, since=since)]
        return [*credit, *caps]
