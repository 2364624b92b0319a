"""An invoice of one month: lines from settled jobs and served usage, pure. It knows no table and rounds once per line."""

import enum
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from services.billing.pricing import round_to_cent

_MONTH = re.compile(r"(20[0-9]{2})-(0[1-9]|1[0-2])")


class LineKind(enum.StrEnum):
    TUNING = "tuning"
    ENDPOINT = "endpoint"
    INFERENCE = "inference"


UNITS = {LineKind.TUNING: "tokens", LineKind.ENDPOINT: "minutes", LineKind.INFERENCE: "tokens"}


@dataclass(frozen=True, kw_only=True)
class Month:
    """A calendar month in UTC."""

    year: int
    month: int

    @classmethod
    def of(cls, moment: datetime) -> "Month":
        moment = moment.astimezone(UTC)
        return cls(year=moment.year, month=moment.month)

    @classmethod
    def parse(cls, text: str) -> "Month | None":
        """`2026-11`; None when it is not one."""
        found = _MONTH.fullmatch(text)
        return cls(year=int(found.group(1)), month=int(found.group(2))) if found else None

    @property
    def start(self) -> datetime:
        return datetime(self.year, self.month, 1, tzinfo=UTC)

    @property
    def end(self) -> datetime:
        return datetime(self.year + self.month // 12, self.month % 12 + 1, 1, tzinfo=UTC)

    def __str__(self) -> str:
        return f"{self.year:04d}-{self.month:02d}"


@dataclass(frozen=True, kw_only=True)
class Charge:
    """What one job, endpoint or model was charged in the month at one set of prices, exact, before rounding.

    `unit_price_nanos_usd` is of a million tokens or of one minute, 0 where prices mix. `usage_records` are the first
    names of the records behind it, in the order of their times.
    """

    kind: LineKind
    resource: str
    model: str
    quantity: int
    unit_price_nanos_usd: int
    amount_nanos_usd: int
    price_book_version: str
    usage_records: tuple[str, ...]
    usage_record_count: int
    minimum_applied: bool = False


@dataclass(frozen=True, kw_only=True)
class Line:
    description: str
    unit: str
    charge: Charge
    amount_nanos_usd: int


@dataclass(frozen=True, kw_only=True)
class Invoice:
    organization_id: str
    month: Month
    lines: tuple[Line, ...]
    open: bool

    @property
    def total_nanos_usd(self) -> int:
        return sum(line.amount_nanos_usd for line in self.lines)


def build(*, organization_id: str, month: Month, charges: Iterable[Charge], now: datetime) -> Invoice:
    """Tuning first, then endpoints, then served models; each by resource and price-book version."""
    order = list(LineKind)
    sorted_charges = sorted(
        charges,
        key=lambda charge: (order.index(charge.kind), charge.resource, charge.model, charge.price_book_version),
    )
    lines = tuple(
        Line(
            description=_description(charge),
            unit=UNITS[charge.kind],
            charge=charge,
            amount_nanos_usd=round_to_cent(charge.amount_nanos_usd),
        )
        for charge in sorted_charges
    )
    return Invoice(organization_id=organization_id, month=month, lines=lines, open=now < month.end)


def _description(charge: Charge) -> str:
    if charge.kind is LineKind.TUNING:
        name = charge.resource.rpartition("/")[2]
        minimum = ", minimum per completed job" if charge.minimum_applied else ""
        return f"Tuning of {charge.model}, job {name}{minimum}"
    if charge.kind is LineKind.ENDPOINT:
        return f"Dedicated endpoint {charge.resource.rpartition('/')[2]}, device minutes on {charge.model}"
    return f"Tokens served by {charge.resource}"
