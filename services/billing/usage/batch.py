"""Usage records on their way into the database, as columns: what many records share is said once. It prices nothing.

A message brings hundreds of records that differ in three or four values; a value object for each would cost more than
booking it.
"""

import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import NamedTuple

from services.billing.usage.records import UsageKind, UsageRecord


class Terms(NamedTuple):
    """What records share. Two records with equal terms are summed in one row of `usage_sums`."""

    kind: UsageKind
    organization_id: str
    project_id: str
    resource: str
    model: str
    unit_price_nanos_usd: int
    price_book_version: str
    billing_month: date
    api_key_id: str
    transaction_id: uuid.UUID | None
    # Of a range of training steps; 0 for everything else.
    start_step: int = 0
    end_step: int = 0


@dataclass(kw_only=True)
class UsageBatch:
    """Row i has the terms `terms[numbers[i] - 1]` and the i-th value of each other column."""

    terms: dict[Terms, int] = field(default_factory=dict)
    numbers: list[int] = field(default_factory=list)
    work_keys: list[str] = field(default_factory=list)
    quantities: list[int] = field(default_factory=list)
    amounts: list[int] = field(default_factory=list)
    usage_times: list[datetime] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.work_keys)

    def number(self, terms: Terms) -> int:
        """The number of these terms, from 1; the same terms have the same number."""
        return self.terms.setdefault(terms, len(self.terms) + 1)

    def add(self, number: int, work_key: str, quantity: int, amount_nanos_usd: int, usage_time: datetime) -> None:
        self.numbers.append(number)
        self.work_keys.append(work_key)
        self.quantities.append(quantity)
        self.amounts.append(amount_nanos_usd)
        self.usage_times.append(usage_time)

    @classmethod
    def of(cls, records: Iterable[UsageRecord]) -> "UsageBatch":
        batch = cls()
        for record in records:
            terms = Terms(
                kind=record.kind,
                organization_id=record.organization_id,
                project_id=record.project_id,
                resource=record.resource,
                model=record.model,
                unit_price_nanos_usd=record.unit_price_nanos_usd,
                price_book_version=record.price_book_version,
                billing_month=record.billing_month,
                api_key_id=record.api_key_id,
                transaction_id=record.transaction_id,
                start_step=record.start_step,
                end_step=record.end_step,
            )
            batch.add(batch.number(terms), record.work_key, record.quantity, record.amount_nanos_usd, record.usage_time)
        return batch
