"""An invoice of one month: lines from settled jobs and served usage, credit notes, totals.

It knows no table and no message, and it rounds once per line.
"""

import enum
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from types import MappingProxyType

from services.billing.calendar import Month
from services.billing.prices.pricing import round_to_cent
from services.billing.terms import NOBODY, Party
from services.billing.usage.records import UsageKind


class LineKind(enum.StrEnum):
    """In the order of the lines."""

    TUNING = "tuning"
    ENDPOINT = "endpoint"
    CLUSTER = "cluster"
    INFERENCE = "inference"


UNITS: Mapping[LineKind, str] = MappingProxyType(
    {
        LineKind.TUNING: "tokens",
        LineKind.ENDPOINT: "minutes",
        LineKind.CLUSTER: "hours",
        LineKind.INFERENCE: "tokens",
    }
)
# What was served, and the line it is on; tokens of a job are on the job's own line.
SERVED: Mapping[UsageKind, LineKind] = MappingProxyType(
    {
        UsageKind.INPUT_TOKENS: LineKind.INFERENCE,
        UsageKind.OUTPUT_TOKENS: LineKind.INFERENCE,
        UsageKind.ENDPOINT_MINUTES: LineKind.ENDPOINT,
        UsageKind.CLUSTER_HOURS: LineKind.CLUSTER,
    }
)


@dataclass(frozen=True, kw_only=True)
class Charge:
    """What one job, endpoint, cluster or model was charged in the month at one price, exact, before rounding.

    `usage_kind` is empty for a job, whose line counts all its tokens. `unit_price_nanos_usd` is of a million tokens, a
    device minute or a node hour. `usage_records` are the first names of the records behind it.
    """

    kind: LineKind
    project_id: str
    resource: str
    usage_kind: str
    model: str
    quantity: int
    unit_price_nanos_usd: int
    amount_nanos_usd: int
    price_book_version: str
    usage_record_count: int
    usage_records: tuple[str, ...] = ()
    minimum_applied: bool = False

    @property
    def key(self) -> tuple[str, str, str, str, str, int]:
        """What tells the line from the others of its kind."""
        return (
            self.project_id,
            self.resource,
            self.model,
            self.usage_kind,
            self.price_book_version,
            self.unit_price_nanos_usd,
        )


@dataclass(frozen=True, kw_only=True)
class Line:
    description: str
    unit: str
    charge: Charge
    amount_nanos_usd: int


@dataclass(frozen=True, kw_only=True)
class CreditNote:
    """Money given back. `billing_month` is the first day of the month whose invoice has it."""

    number: int
    organization_id: str
    request_id: str
    amount_nanos_usd: int
    reason: str
    resource: str
    invoice: str
    transaction_id: uuid.UUID
    billing_month: date
    create_time: datetime

    @property
    def claim(self) -> tuple[int, str, str, str]:
        """What two calls with the same request id must agree on."""
        return (self.amount_nanos_usd, self.reason, self.resource, self.invoice)


@dataclass(frozen=True, kw_only=True)
class Invoice:
    """`number` is 0 and `close_time` None until it is closed. `owed_nanos_usd` is what the credit did not cover of all
    usage, then or now."""

    organization_id: str
    month: Month
    lines: tuple[Line, ...]
    credit_notes: tuple[CreditNote, ...] = ()
    issuer: Party = NOBODY
    customer: Party = NOBODY
    tax_note: str = ""
    owed_nanos_usd: int = 0
    number: int = 0
    close_time: datetime | None = None

    @property
    def open(self) -> bool:
        return self.close_time is None

    @property
    def empty(self) -> bool:
        return not self.lines and not self.credit_notes

    @property
    def total_nanos_usd(self) -> int:
        """A credit note is a line with a negative amount, rounded once like the others."""
        given_back = sum(round_to_cent(note.amount_nanos_usd) for note in self.credit_notes)
        return sum(line.amount_nanos_usd for line in self.lines) - given_back


def build_lines(charges: Iterable[Charge]) -> tuple[Line, ...]:
    """Tuning first, then endpoints, clusters and served models; each by project, resource and price."""
    order = list(LineKind)
    return tuple(
        Line(
            description=_description(charge),
            unit=UNITS[charge.kind],
            charge=charge,
            amount_nanos_usd=round_to_cent(charge.amount_nanos_usd),
        )
        for charge in sorted(charges, key=lambda charge: (order.index(charge.kind), charge.key))
    )


def invoice_number(number: int) -> str:
    return f"FM-{number:06d}"


def credit_note_number(number: int) -> str:
    return f"CN-{number:06d}"


def _description(charge: Charge) -> str:
    name = charge.resource.rpartition("/")[2]
    if charge.kind is LineKind.TUNING:
        minimum = ", minimum per completed job" if charge.minimum_applied else ""
        return f"Tuning of {charge.model}, job {name}{minimum}"
    if charge.kind is LineKind.ENDPOINT:
        return f"Dedicated endpoint {name}, device minutes on {charge.model}"
    if charge.kind is LineKind.CLUSTER:
        return f"Cluster {name}, node hours on {charge.model}"
    side = {UsageKind.INPUT_TOKENS: "Input tokens", UsageKind.OUTPUT_TOKENS: "Output tokens"}
    return f"{side.get(UsageKind(charge.usage_kind), 'Tokens')} served by {charge.resource}"
