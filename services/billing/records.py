"""What billing remembers: usage records, holds, endings of jobs. Plain values; no rule and no table."""

import enum
import uuid
from dataclasses import dataclass
from datetime import date, datetime

from services.billing.caps import Spender
from services.billing.ledger import HoldState, usage_record_id
from services.billing.pricing import Work
from services.billing.settlement import Ending


class UsageKind(enum.StrEnum):
    TRAINING_TOKENS = "training_tokens"
    EVALUATION_TOKENS = "evaluation_tokens"
    INPUT_TOKENS = "input_tokens"
    OUTPUT_TOKENS = "output_tokens"
    ENDPOINT_MINUTES = "endpoint_minutes"
    CLUSTER_HOURS = "cluster_hours"


@dataclass(frozen=True, kw_only=True)
class UsageRecord:
    """One priced fact. `unit_price_nanos_usd` is of a million tokens, a device minute or a node hour; `model` is the base
    model whose price applies, or the hardware type. `billing_month` is the first day of the month whose invoice has it;
    `transaction_id` names the entry that posted it, None for a job's records, which its settlement posts."""

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
    billing_month: date
    api_key_id: str = ""
    transaction_id: uuid.UUID | None = None

    @property
    def id(self) -> uuid.UUID:
        return usage_record_id(self.project_id, self.work_key)

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
    expire_time: datetime
    end_time: datetime | None
    api_key_id: str = ""

    @property
    def spender(self) -> Spender:
        """Whose budgets the job counts for."""
        return Spender(self.project_id, self.api_key_id)

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
    # What the records are worth at the rates of the quote.
    amount_nanos_usd: int
