"""A price book: one dated version of rules and rates, and how a rate is found in it.

It holds data. Reading YAML is `parse.py`, arithmetic is `pricing.py`, all versions together are `catalogue.py`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol, TypeVar

from services.billing.limits import Limits
from services.billing.prices.pricing import (
    Price,
    PriceUnknown,
    QuantityInvalid,
    TuningRule,
    Work,
    check_work,
    device_minute_nanos_usd,
    quote,
)

PARAMETERS_PER_BILLION = 10**9


class BookConflict(ValueError):
    """Two books cannot stand on one catalogue."""


@dataclass(frozen=True, kw_only=True)
class Selector:
    """What an entry is for: one id, all ids that begin with `prefix`, or a range of sizes in whole billions.

    Exactly one of the three is set. An id wins over a prefix, a longer prefix over a shorter, a prefix over a size.
    """

    exact: str = ""
    prefix: str | None = None
    billions: tuple[int, int] | None = None

    def __str__(self) -> str:
        if self.billions is not None:
            return f"{self.billions[0]} to {self.billions[1]} billion parameters"
        return self.exact or f"{self.prefix}*"

    def overlaps(self, other: "Selector") -> bool:
        """True when both could be the best match of one id: such a book would be ambiguous."""
        if self.billions is not None and other.billions is not None:
            return self.billions[0] <= other.billions[1] and other.billions[0] <= self.billions[1]
        return self == other

    def rank(self, name: str, billions: int | None) -> int | None:
        """How well it fits, higher is better; None when it does not."""
        if self.billions is not None:
            fits = billions is not None and self.billions[0] <= billions <= self.billions[1]
            return 0 if fits else None
        if self.prefix is not None:
            return 1 + len(self.prefix) if name.startswith(self.prefix) else None
        return 1000 if name == self.exact else None


class _Entry(Protocol):
    @property
    def selector(self) -> Selector: ...


@dataclass(frozen=True, kw_only=True)
class TuningRate:
    """Nano-dollars per million tokens by method."""

    selector: Selector
    nanos_usd_per_million: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class InferenceRate:
    selector: Selector
    input_nanos_usd_per_million: int
    output_nanos_usd_per_million: int


@dataclass(frozen=True, kw_only=True)
class HostingRate:
    selector: Selector
    nanos_usd_per_device_hour: int

    @property
    def nanos_usd_per_device_minute(self) -> int:
        return device_minute_nanos_usd(self.nanos_usd_per_device_hour)


@dataclass(frozen=True, kw_only=True)
class ClusterRate:
    """A node with all of its devices, by the started hour."""

    selector: Selector
    nanos_usd_per_node_hour: int


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a book was read, for messages: `default.yaml, line 4`."""

    file: str
    version_line: int
    dates_line: int

    @property
    def version(self) -> str:
        return f"{self.file}, line {self.version_line}"

    @property
    def dates(self) -> str:
        return f"{self.file}, line {self.dates_line}"


@dataclass(frozen=True, kw_only=True)
class PriceBook:
    """`effective_until` None: until a later version says otherwise, which then must be written down here."""

    book: str
    version: str
    effective_from: datetime
    effective_until: datetime | None
    tuning_rule: TuningRule
    tuning_rates: tuple[TuningRate, ...]
    # Sizes of well-known models, so that a caller who gives only the id gets a price from a book that prices by size.
    model_billions: Mapping[str, int]
    inference_rates: tuple[InferenceRate, ...]
    hosting_rates: tuple[HostingRate, ...]
    cluster_rates: tuple[ClusterRate, ...]
    # Not part of what the book says: the same text may be read from a file and from the database.
    origin: Origin = field(compare=False)

    def effective_at(self, moment: datetime) -> bool:
        return self.effective_from <= moment and (self.effective_until is None or moment < self.effective_until)

    def tuning_rate(self, base_model: str, method: str, parameter_count: int) -> int:
        """Nano-dollars per million tokens."""
        billions = self.model_billions.get(base_model)
        if parameter_count:
            billions = (parameter_count + PARAMETERS_PER_BILLION // 2) // PARAMETERS_PER_BILLION
        offered = [rate for rate in self.tuning_rates if method in rate.nanos_usd_per_million]
        entry = _best(offered, base_model, billions)
        if entry is None:
            hint = "" if billions is not None else "; a parameter_count finds a price by size"
            raise PriceUnknown(f"price book {self.version} has no price to tune {base_model!r} with {method}{hint}")
        return entry.nanos_usd_per_million[method]

    def work_rate(self, work: Work) -> int:
        """Nano-dollars per million tokens of a job."""
        return self.tuning_rate(work.base_model, work.method, work.parameter_count)

    def inference_rate(self, base_model: str) -> InferenceRate:
        entry = _best(self.inference_rates, base_model, self.model_billions.get(base_model))
        if entry is None:
            raise PriceUnknown(f"price book {self.version} has no price for tokens served by {base_model!r}")
        return entry

    def hosting_rate(self, hardware_type: str) -> HostingRate:
        entry = _best(self.hosting_rates, hardware_type, None)
        if entry is None:
            raise PriceUnknown(f"price book {self.version} has no price for hardware {hardware_type!r}")
        return entry

    def cheapest_hosting_rate(self) -> HostingRate:
        """Of the hardware that has a price, for a device of any type."""
        if not self.hosting_rates:
            raise PriceUnknown(f"price book {self.version} has no price for hardware")
        return min(self.hosting_rates, key=lambda rate: rate.nanos_usd_per_device_hour)

    def cluster_rate(self, hardware_type: str) -> ClusterRate:
        entry = _best(self.cluster_rates, hardware_type, None)
        if entry is None:
            raise PriceUnknown(f"price book {self.version} has no price for cluster nodes of {hardware_type!r}")
        return entry


_E = TypeVar("_E", bound=_Entry)


def _best(entries: Sequence[_E], name: str, billions: int | None) -> _E | None:
    ranked = [(rank, entry) for entry in entries if (rank := entry.selector.rank(name, billions)) is not None]
    return max(ranked, key=lambda pair: pair[0])[1] if ranked else None


def price_job(book: PriceBook, work: Work, limits: Limits) -> Price:
    """What an estimate shows and a hold takes: one code for both. Raises PriceUnknown or QuantityInvalid."""
    check_work(work, limits)
    price = quote(book.tuning_rule, book.work_rate(work), work)
    if price.total_nanos_usd > limits.amount_nanos_usd_max:
        raise QuantityInvalid("training_tokens", f"makes a price above {limits.amount_nanos_usd_max} nano-dollars")
    return price


def refuse_conflict(others: Iterable[PriceBook], book: PriceBook) -> None:
    """Raises BookConflict when `book` cannot stand beside the others: each moment has one version of a book."""
    for other in others:
        if other.version == book.version:
            raise BookConflict(
                f"{book.origin.version}: price book version {book.version!r} exists twice"
                f" (the other: {other.origin.version})"
            )
        if other.book == book.book and _dates_overlap(book, other):
            raise BookConflict(
                f"{book.origin.dates}: price books {other.version!r} and {book.version!r} are effective at the same"
                f" time (the other: {other.origin.dates})"
            )


def _dates_overlap(one: PriceBook, other: PriceBook) -> bool:
    starts_before_other_ends = other.effective_until is None or one.effective_from < other.effective_until
    ends_after_other_starts = one.effective_until is None or other.effective_from < one.effective_until
    return starts_before_other_ends and ends_after_other_starts
