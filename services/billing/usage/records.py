"""What billing remembers of usage, and what events claim of it. Plain values; no rule and no table.

A fact is one report of work by whoever did it. A record is that fact with its price.
"""

import enum
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime
from types import MappingProxyType

from services.billing.ledger.derived_ids import usage_record_id


class UsageKind(enum.StrEnum):
    TRAINING_TOKENS = "training_tokens"
    EVALUATION_TOKENS = "evaluation_tokens"
    INPUT_TOKENS = "input_tokens"
    OUTPUT_TOKENS = "output_tokens"
    ENDPOINT_MINUTES = "endpoint_minutes"
    CLUSTER_HOURS = "cluster_hours"


# What a price rule calls the tokens of a job, by the kind of their records.
RULE_TOKENS: Mapping[UsageKind, str] = MappingProxyType(
    {UsageKind.TRAINING_TOKENS: "training_tokens", UsageKind.EVALUATION_TOKENS: "validation_tokens"}
)


@dataclass(frozen=True, kw_only=True)
class UsageRecord:
    """One priced fact.

    `unit_price_nanos_usd` is of a million tokens, a device minute or a node hour; `model` is the base model whose price
    applies, or the hardware type. `billing_month` is the first day of the month whose invoice has it. `transaction_id`
    names the entry that posted it; it is None for a job's records, which its settlement posts.
    """

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
class Fact:
    work_key: str
    organization_id: str
    project_id: str
    # The job, model, endpoint or cluster that used it.
    resource: str
    usage_time: datetime


@dataclass(frozen=True, kw_only=True)
class TrainingFact(Fact):
    """Tokens of a range of steps, or of one evaluation."""

    kind: UsageKind
    start_step: int
    end_step: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class InferenceFact(Fact):
    base_model: str
    input_tokens: int
    output_tokens: int
    api_key_id: str = ""
    # The lease of credit that the call was reserved from; it says nothing of the work and is not recorded.
    credit_lease_id: str = ""

    @property
    def claim(self) -> tuple[str | int, ...]:
        """What two reports of the same call must agree on."""
        return (self.organization_id, self.resource, self.base_model, self.input_tokens, self.output_tokens)


@dataclass(frozen=True, kw_only=True)
class EndpointFact(Fact):
    hardware_type: str
    device_count: int
    minute: int


@dataclass(frozen=True, kw_only=True)
class ClusterFact(Fact):
    hardware_type: str
    node_count: int
    hour: int
