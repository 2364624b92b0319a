"""A job's hold, its lifecycle, and how the job ended. Plain values and one table of states."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType

from services.billing.budgets.caps import Spender
from services.billing.holds.settlement import Ending
from services.billing.prices.pricing import Work


class HoldState(enum.StrEnum):
    HELD = "held"
    SETTLED = "settled"
    RELEASED = "released"
    EXPIRED = "expired"


# The lifecycle of a hold: event -> (allowed sources, destination).
HOLD_TRANSITIONS: Mapping[str, tuple[frozenset[HoldState], HoldState]] = MappingProxyType(
    {
        "settle": (frozenset({HoldState.HELD}), HoldState.SETTLED),
        "release": (frozenset({HoldState.HELD}), HoldState.RELEASED),
        "expire": (frozenset({HoldState.HELD}), HoldState.EXPIRED),
    }
)


@dataclass(frozen=True, kw_only=True)
class Hold:
    """A job's quote and the money held for it."""

    id: str
    resource: str
    organization_id: str
    project_id: str
    state: HoldState
    work: Work
    price_book_version: str
    held_nanos_usd: int
    charged_nanos_usd: int
    discrepancy: str
    hold_time: datetime
    expire_time: datetime
    end_time: datetime | None
    api_key_id: str = ""

    @property
    def spender(self) -> Spender:
        """Whose budgets the job counts for."""
        return Spender(self.project_id, self.api_key_id)

    @property
    def is_open(self) -> bool:
        return self.state is HoldState.HELD

    @property
    def released_nanos_usd(self) -> int:
        return 0 if self.state is HoldState.HELD else self.held_nanos_usd - self.charged_nanos_usd


@dataclass(frozen=True, kw_only=True)
class Overdue:
    """Open holds that nobody renewed in time, all together."""

    hold_count: int
    held_nanos_usd: int


@dataclass(frozen=True, kw_only=True)
class JobEnding:
    """A job's end as its final event told it; `usage_record_count` records belong to the job."""

    resource: str
    organization_id: str
    project_id: str
    ending: Ending
    usage_record_count: int
    end_time: datetime


@dataclass(frozen=True, kw_only=True)
class JobTotals:
    """What is booked for a job so far."""

    record_count: int
    training_tokens: int
    evaluation_tokens: int
    # What the records are worth at the rates of the quote.
    amount_nanos_usd: int
