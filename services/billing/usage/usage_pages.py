"""Pages of usage records with filters, newest or oldest first.

One page looks at a bounded number of records, so that a rare filter over very many records costs many short statements
and never one long one: a page may then hold fewer records than were asked for, and still tell where to go on.
"""

from dataclasses import dataclass
from datetime import UTC, date, datetime

from services.billing.usage.records import UsageKind, UsageRecord

# Before and after every record that can be booked.
EARLIEST, LATEST = datetime(2000, 1, 1, tzinfo=UTC), datetime(9000, 1, 1, tzinfo=UTC)

Position = tuple[datetime, str]


@dataclass(frozen=True, kw_only=True)
class UsageFilter:
    """Records of one project whose use ended from `start` on and before `end`. Empty texts and kinds filter nothing."""

    project_id: str
    start: datetime = EARLIEST
    end: datetime = LATEST
    resource: str = ""
    kinds: tuple[UsageKind, ...] = ()
    model: str = ""
    api_key_id: str = ""
    billing_month: date | None = None

    @property
    def open(self) -> bool:
        """Whether every record of the span matches."""
        return not (self.resource or self.kinds or self.model or self.api_key_id)


@dataclass(frozen=True, kw_only=True)
class UsagePage:
    """`next` is where the next page begins; None when there is nothing more."""

    records: tuple[UsageRecord, ...]
    next: Position | None
