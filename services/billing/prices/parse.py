"""Reads the sections of a price book's file; a wrong book is refused with its line. It prices nothing.

`books/schema.json` says the same for editors and other tools, as far as a schema can; a test compares the two.
"""

from collections.abc import Callable
from typing import Protocol, TypeVar

from services.billing.prices.method_keys import METHODS
from services.billing.prices.pricebook import (
    ClusterRate,
    HostingRate,
    InferenceRate,
    Origin,
    PriceBook,
    Selector,
    TuningRate,
)
from services.billing.prices.pricing import COMPLETED, FACTORS_DONE, OWING_ENDINGS, RuleTerm, TuningRule
from services.billing.prices.yaml import Node, read_root


class _Selected(Protocol):
    @property
    def selector(self) -> Selector: ...


_S = TypeVar("_S", bound=_Selected)


def read_book(text: str, origin: str) -> PriceBook:
    """`origin` is the file's name, for the messages of BookInvalid."""
    root = read_root(text, origin).fields(
        ["book", "version", "effective_from", "currency", "tuning"],
        ["effective_until", "inference", "hosting", "clusters"],
    )
    root["currency"].one_of(["USD"])
    effective_from = root["effective_from"].moment()
    effective_until = root["effective_until"].moment() if "effective_until" in root else None
    if effective_until is not None and effective_until <= effective_from:
        raise root["effective_until"].wrong("a book must end after it begins")
    tuning = root["tuning"].fields(
        ["terms", "rates"], ["base_fee", "base_fee_usd", "minimum", "minimum_usd", "model_billions"]
    )
    base_fee, base_fee_applies_to = _fixed(root["tuning"], tuning, "base_fee", OWING_ENDINGS)
    minimum, minimum_applies_to = _fixed(root["tuning"], tuning, "minimum", (COMPLETED,))
    return PriceBook(
        book=root["book"].identifier(),
        version=root["version"].identifier(),
        effective_from=effective_from,
        effective_until=effective_until,
        tuning_rule=TuningRule(
            terms=_terms(tuning["terms"]),
            base_fee_nanos_usd=base_fee,
            minimum_nanos_usd=minimum,
            base_fee_applies_to=base_fee_applies_to,
            minimum_applies_to=minimum_applies_to,
        ),
        tuning_rates=_tuning_rates(tuning["rates"]),
        model_billions=_model_billions(tuning.get("model_billions")),
        inference_rates=_distinct(root.get("inference"), _inference_rate),
        hosting_rates=_distinct(root.get("hosting"), _hosting_rate),
        cluster_rates=_distinct(root.get("clusters"), _cluster_rate),
        origin=Origin(file=origin, version_line=root["version"].line, dates_line=root["effective_from"].line),
    )


def _fixed(tuning: Node, found: dict[str, Node], name: str, usual: tuple[str, ...]) -> tuple[int, frozenset[str]]:
    """A base fee or minimum, and the endings that it applies to; `minimum_usd: 5` is short for the usual ones."""
    given = tuning.one_of_fields(found, (name, f"{name}_usd"), "how much it is")
    if given != name:
        return found[given].nanos_usd(), frozenset(usual)
    fields = found[name].fields(["usd", "applies_to"])
    endings: list[str] = []
    for item in fields["applies_to"].items():
        ending = item.one_of(OWING_ENDINGS)
        if ending in endings:
            raise item.wrong(f"{ending!r} is given twice")
        endings.append(ending)
    return fields["usd"].nanos_usd(), frozenset(endings)


def _terms(value: Node) -> tuple[RuleTerm, ...]:
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
        terms.append(RuleTerm(description=fields["description"].words(), tokens=tokens, times=tuple(times)))
    if not terms:
        raise value.wrong("a rule needs at least one term")
    return tuple(terms)


def _tuning_rates(value: Node) -> tuple[TuningRate, ...]:
    rates: list[tuple[TuningRate, int]] = []
    for item in value.items():
        fields = item.fields(["usd_per_million_tokens"], ["model", "billions"])
        prices = fields["usd_per_million_tokens"].fields([], METHODS)
        if not prices:
            raise fields["usd_per_million_tokens"].wrong(f"a rate needs at least one of {', '.join(METHODS)}")
        rate = TuningRate(
            selector=_selector(item, fields, "model"),
            nanos_usd_per_million={method: price.nanos_usd() for method, price in prices.items()},
        )
        for other, line in rates:
            shared = set(rate.nanos_usd_per_million) & set(other.nanos_usd_per_million)
            if shared and rate.selector.overlaps(other.selector):
                methods = ", ".join(sorted(shared))
                raise item.wrong(f"ambiguous: {rate.selector} overlaps {other.selector} of line {line} for {methods}")
        rates.append((rate, item.line))
    if not rates:
        raise value.wrong("a book needs at least one rate")
    return tuple(rate for rate, _ in rates)


def _inference_rate(item: Node) -> InferenceRate:
    fields = item.fields(["input_usd_per_million_tokens", "output_usd_per_million_tokens"], ["model", "billions"])
    return InferenceRate(
        selector=_selector(item, fields, "model"),
        input_nanos_usd_per_million=fields["input_usd_per_million_tokens"].nanos_usd(),
        output_nanos_usd_per_million=fields["output_usd_per_million_tokens"].nanos_usd(),
    )


def _hosting_rate(item: Node) -> HostingRate:
    fields = item.fields(["hardware_type", "usd_per_device_hour"])
    return HostingRate(
        selector=_named(fields["hardware_type"]),
        nanos_usd_per_device_hour=fields["usd_per_device_hour"].nanos_usd(),
    )


def _cluster_rate(item: Node) -> ClusterRate:
    fields = item.fields(["hardware_type", "usd_per_node_hour"])
    return ClusterRate(
        selector=_named(fields["hardware_type"]),
        nanos_usd_per_node_hour=fields["usd_per_node_hour"].nanos_usd(),
    )


def _distinct(value: Node | None, read: Callable[[Node], _S]) -> tuple[_S, ...]:
    entries: list[tuple[_S, int]] = []
    for item in value.items() if value is not None else []:
        entry = read(item)
        for other, line in entries:
            if entry.selector.overlaps(other.selector):
                raise item.wrong(f"ambiguous: {entry.selector} overlaps {other.selector} of line {line}")
        entries.append((entry, item.line))
    return tuple(entry for entry, _ in entries)


def _selector(item: Node, fields: dict[str, Node], id_field: str) -> Selector:
    if item.one_of_fields(fields, (id_field, "billions"), "what the rate is for") == id_field:
        return _named(fields[id_field])
    bounds = [bound.billions() for bound in fields["billions"].items()]
    if len(bounds) != 2 or bounds[0] > bounds[1]:
        raise fields["billions"].wrong("a range of sizes is [first, last] in billions, both included")
    return Selector(billions=(bounds[0], bounds[1]))


def _named(name: Node) -> Selector:
    if name.text().endswith("*"):
        return Selector(prefix=name.prefix())
    return Selector(exact=name.identifier())


def _model_billions(value: Node | None) -> dict[str, int]:
    return {name: size.billions() for name, size in value.identified().items()} if value is not None else {}
