"""Reads a price book from YAML and refuses one that is wrong, naming the line. It prices nothing.

Amounts are read from the text of the file, never through a float.
"""

import re
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Protocol, TypeVar

import yaml

from services.billing.pricebook import HostingRate, InferenceRate, PriceBook, Selector, TuningRate
from services.billing.pricing import FACTORS_DONE, METHODS, NANOS_USD_PER_USD, RuleTerm, TuningRule

# A rate above this is a slip of the keyboard: a million dollars for a million tokens, or for an hour.
AMOUNT_USD_MAX = 10**6
BILLIONS_MAX = 10**5
ENTRIES_MAX = 5000
_IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
_AMOUNT = re.compile(r"[0-9]{1,15}(\.[0-9]{1,9})?")


class BookInvalid(ValueError):
    """The message begins with file and line."""


class _Selected(Protocol):
    @property
    def selector(self) -> Selector: ...


_S = TypeVar("_S", bound=_Selected)


class _Value:
    """A node of the file that knows where it stands."""

    def __init__(self, node: yaml.Node, origin: str) -> None:
        self._node = node
        self._origin = origin

    @property
    def line(self) -> int:
        return int(self._node.start_mark.line) + 1

    def wrong(self, problem: str) -> BookInvalid:
        return BookInvalid(f"{self._origin}, line {self.line}: {problem}")

    def fields(self, needed: Sequence[str], optional: Sequence[str] = ()) -> dict[str, "_Value"]:
        """The entries of a mapping; unknown, double and missing keys are refused."""
        found = self.entries()
        for key, value in found.items():
            if key not in needed and key not in optional:
                raise value.wrong(f"{key!r} is not known here; known are {', '.join((*needed, *optional))}")
        for key in needed:
            if key not in found:
                raise self.wrong(f"{key!r} is missing")
        return found

    def entries(self) -> dict[str, "_Value"]:
        if not isinstance(self._node, yaml.MappingNode):
            raise self.wrong("a mapping is expected")
        found: dict[str, _Value] = {}
        for key_node, value_node in self._node.value:
            key = _Value(key_node, self._origin)
            if key.text() in found:
                raise key.wrong(f"{key.text()!r} is given twice")
            found[key.text()] = _Value(value_node, self._origin)
        return found

    def items(self) -> list["_Value"]:
        if not isinstance(self._node, yaml.SequenceNode):
            raise self.wrong("a list is expected")
        if len(self._node.value) > ENTRIES_MAX:
            raise self.wrong(f"a list has at most {ENTRIES_MAX} entries")
        return [_Value(node, self._origin) for node in self._node.value]

    def text(self) -> str:
        if not isinstance(self._node, yaml.ScalarNode) or not self._node.value:
            raise self.wrong("a value is expected")
        return str(self._node.value)

    def identifier(self) -> str:
        if not _IDENTIFIER.fullmatch(self.text()):
            raise self.wrong(f"{self.text()!r} is no id: letters, digits and . _ / - are allowed")
        return self.text()

    def prefix(self) -> str:
        """The part of `meta-llama/*` before the star."""
        if not _IDENTIFIER.fullmatch(self.text()[:-1]):
            raise self.wrong(f"{self.text()!r} is no pattern: an id with one star at its end")
        return self.text()[:-1]

    def one_of(self, choices: Sequence[str]) -> str:
        if self.text() not in choices:
            raise self.wrong(f"{self.text()!r} is not one of {', '.join(choices)}")
        return self.text()

    def nanos_usd(self) -> int:
        """An amount in dollars, as nano-dollars."""
        if not _AMOUNT.fullmatch(self.text()):
            raise self.wrong(f"an amount is dollars with at most nine decimals and not negative, not {self.text()!r}")
        nanos = int(Decimal(self.text()) * NANOS_USD_PER_USD)
        if nanos > AMOUNT_USD_MAX * NANOS_USD_PER_USD:
            raise self.wrong(f"an amount is at most {AMOUNT_USD_MAX} dollars, not {self.text()}")
        return nanos

    def billions(self) -> int:
        if not self.text().isascii() or not self.text().isdigit() or int(self.text()) > BILLIONS_MAX:
            raise self.wrong(f"a size is a whole number of billions up to {BILLIONS_MAX}: {self.text()!r}")
        return int(self.text())

    def moment(self) -> datetime:
        """Midnight UTC of a date."""
        try:
            day = date.fromisoformat(self.text())
        except ValueError:
            raise self.wrong(f"{self.text()!r} is no date like 2026-01-31") from None
        return datetime(day.year, day.month, day.day, tzinfo=UTC)


def read_book(text: str, origin: str) -> PriceBook:
    """`origin` is the file's name, for the messages of BookInvalid."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise BookInvalid(f"{origin}, line {line}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise BookInvalid(f"{origin}, line 1: {error}") from None
    if node is None:
        raise BookInvalid(f"{origin}, line 1: the file is empty")
    root = _Value(node, origin).fields(
        ["book", "version", "effective_from", "currency", "tuning"], ["effective_until", "inference", "hosting"]
    )
    root["currency"].one_of(["USD"])
    effective_from = root["effective_from"].moment()
    effective_until = root["effective_until"].moment() if "effective_until" in root else None
    if effective_until is not None and effective_until <= effective_from:
        raise root["effective_until"].wrong("a book must end after it begins")
    tuning = root["tuning"].fields(["terms", "base_fee_usd", "minimum_usd", "rates"], ["model_billions"])
    return PriceBook(
        book=root["book"].identifier(),
        version=root["version"].identifier(),
        effective_from=effective_from,
        effective_until=effective_until,
        tuning_rule=TuningRule(
            terms=_terms(tuning["terms"]),
            base_fee_nanos_usd=tuning["base_fee_usd"].nanos_usd(),
            minimum_nanos_usd=tuning["minimum_usd"].nanos_usd(),
        ),
        tuning_rates=_tuning_rates(tuning["rates"]),
        model_billions=_model_billions(tuning.get("model_billions")),
        inference_rates=_distinct(root.get("inference"), _inference_rate),
        hosting_rates=_distinct(root.get("hosting"), _hosting_rate),
    )


def _terms(value: _Value) -> tuple[RuleTerm, ...]:
    terms: list[RuleTerm] = []
    for item in value.items():
        fields = item.fields(["description", "tokens", "times"])
        tokens = fields["tokens"].one_of(list(FACTORS_DONE))
        if any(term.tokens == tokens for term in terms):
            raise item.wrong(f"two terms bill {tokens}")
        times: list[str] = []
        for factor in fields["times"].items():
            times.append(factor.one_of(FACTORS_DONE[tokens]))
            if len(set(times)) < len(times):
                raise factor.wrong(f"{factor.text()!r} is multiplied twice")
        terms.append(RuleTerm(description=fields["description"].text(), tokens=tokens, times=tuple(times)))
    if not terms:
        raise value.wrong("a rule needs at least one term")
    return tuple(terms)


def _tuning_rates(value: _Value) -> tuple[TuningRate, ...]:
    rates: list[TuningRate] = []
    for item in value.items():
        fields = item.fields(["usd_per_million_tokens"], ["model", "billions"])
        prices = fields["usd_per_million_tokens"].entries()
        for method, price in prices.items():
            if method not in METHODS:
                raise price.wrong(f"{method!r} is not one of {', '.join(METHODS)}")
        rate = TuningRate(
            selector=_selector(item, fields, "model"),
            nanos_usd_per_million={method: price.nanos_usd() for method, price in prices.items()},
        )
        for other in rates:
            shared = set(rate.nanos_usd_per_million) & set(other.nanos_usd_per_million)
            if shared and rate.selector.overlaps(other.selector):
                raise item.wrong(
                    f"ambiguous: {rate.selector} overlaps {other.selector} for {', '.join(sorted(shared))}"
                )
        rates.append(rate)
    if not rates:
        raise value.wrong("a book needs at least one rate")
    return tuple(rates)


def _inference_rate(item: _Value) -> InferenceRate:
    fields = item.fields(["input_usd_per_million_tokens", "output_usd_per_million_tokens"], ["model", "billions"])
    return InferenceRate(
        selector=_selector(item, fields, "model"),
        input_nanos_usd_per_million=fields["input_usd_per_million_tokens"].nanos_usd(),
        output_nanos_usd_per_million=fields["output_usd_per_million_tokens"].nanos_usd(),
    )


def _hosting_rate(item: _Value) -> HostingRate:
    fields = item.fields(["hardware_type", "usd_per_device_hour"])
    return HostingRate(
        selector=_selector(item, fields, "hardware_type"),
        nanos_usd_per_device_hour=fields["usd_per_device_hour"].nanos_usd(),
    )


def _distinct(value: _Value | None, read: Callable[[_Value], _S]) -> tuple[_S, ...]:
    entries: list[_S] = []
    for item in value.items() if value is not None else []:
        entry = read(item)
        for other in entries:
            if entry.selector.overlaps(other.selector):
                raise item.wrong(f"ambiguous: {entry.selector} overlaps {other.selector}")
        entries.append(entry)
    return tuple(entries)


def _selector(item: _Value, fields: dict[str, _Value], id_field: str) -> Selector:
    if (id_field in fields) == ("billions" in fields):
        raise item.wrong(f"exactly one of {id_field!r} and 'billions' says what the rate is for")
    if id_field in fields:
        name = fields[id_field]
        if name.text() == "*":
            return Selector(prefix="")
        if name.text().endswith("*"):
            return Selector(prefix=name.prefix())
        return Selector(exact=name.identifier())
    bounds = [bound.billions() for bound in fields["billions"].items()]
    if len(bounds) != 2 or bounds[0] > bounds[1]:
        raise fields["billions"].wrong("a range of sizes is [first, last] in billions, both included")
    return Selector(billions=(bounds[0], bounds[1]))


def _model_billions(value: _Value | None) -> dict[str, int]:
    return {name: size.billions() for name, size in value.entries().items()} if value is not None else {}
