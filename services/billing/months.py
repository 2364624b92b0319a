"""Which invoice gets what is booked now: reads the closed months of organizations and applies the rule of `periods.py`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime

from chassis.db.pool import Connection
from services.billing import document_store
from services.billing.periods import billing_month, first_of_month


@dataclass(frozen=True)
class OpenMonths:
    """True for as long as the organizations are locked: whoever closes an invoice takes the same locks."""

    closed: Mapping[str, frozenset[date]]
    now: datetime

    @classmethod
    async def read(
        cls, connection: Connection, organization_ids: Sequence[str], moments: Iterable[datetime], now: datetime
    ) -> "OpenMonths":
        """`moments` holds at least the earliest one that will be asked for: the running month cannot be closed, so
        nothing is read for it."""
        running = first_of_month(now)
        if all(first_of_month(moment) >= running for moment in moments):
            return cls({}, now)
        return cls(await document_store.closed_months(connection, organization_ids), now)

    def of(self, organization_id: str, moment: datetime) -> date:
        """First day of the month whose invoice has it."""
        return billing_month(moment, self.closed.get(organization_id, frozenset()), self.now)
