"""What billing remembers: usage records, holds, endings of jobs. Plain values; no rule and no table."""

import enum
import uuid
from dataclasses import dataclass
from datetime import datetime

from services.billing.ledger import HoldState
from services.billing.pricing import Work
from services.billing.settlement import Ending


class UsageKind(enum.StrEnum):
    TRAINING_TOKENS = "training_tokens"
    EVALUATION_TOKENS = "evaluation_tokens"
    INPUT_TOKENS = "input_tokens"
    OUTPUT_TOKENS = "output_tokens"
    ENDPOINT_MINUTES = "endpoint_minutes"


@dataclass(frozen=True, kw_only=True)
class UsageRecord:
    """One priced fact. `unit_price_nanos_usd` is of a million tokens or of one device minute; `model` is the base model
    whose price applies, or the hardware type of a dedicated endpoint."""

    id: uuid.UUID
    work_key: str
    kind: UsageKind
    organization_id: str
    project_id: str
    resource: str
    model: str
    quantity: int
    unit_price_nanos_usd: int
    amount_nanos_usd: int
    price_book_version: str
    start_step: int
    end_step: int
    usage_time: datetime

    @property
    def claim(self) -> tuple[str | int, ...]:
        """What two reports of the same work must agree on."""
        owner = (self.organization_id, self.project_id, self.resource)
        return (self.work_key, self.kind, *owner, self.model, self.quantity, self.start_step, self.end_step)


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
    end_time: datetime | None

    @property
    def released_nanos_usd(self) -> int:
        return 0 if self.state is HoldState.HELD else self.held_nanos_usd - self.charged_nanos_usd


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
