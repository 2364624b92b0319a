"""An invoice of one month: lines from settled jobs and served usage, credit notes, totals.

It knows no table and no message, and it rounds only the total.
"""

import enum
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import date, datetime
from types import MappingProxyType

from services.billing.calendar import Month
from services.billing.prices.pricing import round_to_cent
from services.billing.terms import NOBODY, Party
from services.billing.usage.records import UsageKind


class LineKind(enum.StrEnum):
    """In the order of the lines."""

    TUNING = "tuning"
    # What the tokens of the job before it are short of the minimum.
    MINIMUM = "minimum"
    ENDPOINT = "endpoint"
    CLUSTER = "cluster"
    INFERENCE = "inference"


UNITS: Mapping[LineKind, str] = MappingProxyType(
    {
        LineKind.TUNING: "tokens",
        LineKind.MINIMUM: "",
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


class Rounding(enum.Enum):
    """What is rounded to the cent, half to even."""

    TOTAL = enum.auto()
    # Each line and credit note, as invoices were closed before: only those are rebuilt and drawn like that.
    LINES = enum.auto()

    def amount(self, exact_nanos_usd: int) -> int:
        """The amount of a line or credit note."""
        return round_to_cent(exact_nanos_usd) if self is Rounding.LINES else exact_nanos_usd


@dataclass(frozen=True, kw_only=True)
class Charge:
    """What one job, endpoint, cluster or model was charged in the month at one price, exact.

    `usage_kind` is empty for a job, whose line counts all its tokens. `unit_price_nanos_usd` is of a million tokens, a
    device minute or a node hour. `minimum_nanos_usd` is the part of a job's amount that lifts it to the minimum.
    `usage_records` are the first names of the records behind it.
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
    minimum_nanos_usd: int = 0

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
    rounding: Rounding = Rounding.TOTAL
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
        return round_to_cent(self._sum_nanos_usd)

    @property
    def rounding_nanos_usd(self) -> int:
        """What rounding added to the total, at most half a cent."""
        return self.total_nanos_usd - self._sum_nanos_usd

    @property
    def _sum_nanos_usd(self) -> int:
        """A credit note is a line with a negative amount."""
        given_back = sum(self.rounding.amount(note.amount_nanos_usd) for note in self.credit_notes)
        return sum(line.amount_nanos_usd for line in self.lines) - given_back


def build_lines(charges: Iterable[Charge], rounding: Rounding = Rounding.TOTAL) -> tuple[Line, ...]:
    """Tuning first, then endpoints, clusters and served models; each by project, resource and price. Together they are
    what was charged, exactly."""
    order = list(LineKind)
    listed: Iterable[Charge] = sorted(charges, key=lambda charge: (order.index(charge.kind), charge.key))
    if rounding is Rounding.TOTAL:
        listed = (part for charge in listed for part in _apart(charge))
    return tuple(
        Line(
            description=_description(charge),
            unit=UNITS[charge.kind],
            charge=charge,
            amount_nanos_usd=rounding.amount(charge.amount_nanos_usd),
        )
        for charge in listed
    )


def _apart(charge: Charge) -> Iterator[Charge]:
    """What a job's tokens are worth, and what lifts that to the minimum."""
    minimum_nanos_usd = charge.minimum_nanos_usd
    yield replace(charge, amount_nanos_usd=charge.amount_nanos_usd - minimum_nanos_usd, minimum_nanos_usd=0)
    if minimum_nanos_usd:
        yield replace(
            charge,
            kind=LineKind.MINIMUM,
            quantity=0,
            unit_price_nanos_usd=0,
            amount_nanos_usd=minimum_nanos_usd,
            minimum_nanos_usd=0,
            usage_record_count=0,
            usage_records=(),
        )


def invoice_number(number: int) -> str:
    return f"FM-{number:06d}"


def credit_note_number(number: int) -> str:
    return f"CN-{number:06d}"


def _description(charge: Charge) -> str:
    name = charge.resource.rpartition("/")[2]
    if charge.kind is LineKind.TUNING:
        return f"Tuning of {charge.model}, job {name}"
    if charge.kind is LineKind.MINIMUM:
        return f"Up to the minimum of a job, job {name}"
    if charge.kind is LineKind.ENDPOINT:
        return f"Dedicated endpoint {name}, device minutes on {charge.model}"
    if charge.kind is LineKind.CLUSTER:
        return f"Cluster {name}, node hours on {charge.model}"
    side = {UsageKind.INPUT_TOKENS: "Input tokens", UsageKind.OUTPUT_TOKENS: "Output tokens"}
    return f"{side.get(UsageKind(charge.usage_kind), 'Tokens')} served by {charge.resource}"
