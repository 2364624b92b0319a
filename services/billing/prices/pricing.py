"""What work costs: pure functions of a rule, a rate and counts, in integer nano-dollars.

It knows no price and no model: rules and rates are data (`pricebook.py`). Multiply first, round once per term.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType

from services.billing.limits import Limits

NANOS_USD_PER_USD = 10**9
NANOS_USD_PER_CENT = NANOS_USD_PER_USD // 100
TOKENS_PER_RATE = 10**6
MINUTES_PER_HOUR = 60

# How a job can end and owe something. A book says for which of them it adds its base fee or lifts to its minimum.
COMPLETED = "completed"
OWING_ENDINGS = (COMPLETED, "stopped_early", "cancelled_running", "user_failure")

# What a run really does with each count: validation tokens are read `evaluations` times in every epoch. A rule may
# leave a factor out and bill less than what is done; it can never bill more.
FACTORS_DONE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"training_tokens": ("epochs",), "validation_tokens": ("epochs", "evaluations")}
)


class PriceUnknown(LookupError):
    """No price book, or no rate in it, for what was asked; the message says what to do."""


class QuantityInvalid(ValueError):
    """A count is outside of its bounds; `field` names it."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field} {problem}")
        self.field = field
        self.problem = problem


@dataclass(frozen=True, kw_only=True)
class Work:
    """The numbers of a tuning job that its price depends on. `parameter_count` 0: only the model's id is known."""

    base_model: str
    method: str
    training_tokens: int
    validation_tokens: int
    epochs: int
    evaluations: int
    parameter_count: int = 0

    def count(self, name: str) -> int:
        value: int = getattr(self, name)
        return value


@dataclass(frozen=True, kw_only=True)
class Metered:
    """Tokens that were really processed: each counted as often as the run saw it."""

    training_tokens: int = 0
    validation_tokens: int = 0

    def count(self, name: str) -> int:
        value: int = getattr(self, name)
        return value

    @property
    def nothing(self) -> bool:
        return not self.training_tokens and not self.validation_tokens


@dataclass(frozen=True, kw_only=True)
class RuleTerm:
    """`tokens` times the product of the counts in `times`, at the model's rate."""

    description: str
    tokens: str
    times: tuple[str, ...]

    @property
    def left_out(self) -> tuple[str, ...]:
        """Factors of the work that this term does not bill."""
        return tuple(factor for factor in FACTORS_DONE[self.tokens] if factor not in self.times)


@dataclass(frozen=True, kw_only=True)
class TuningRule:
    """The terms, and what is added to them at the endings that are named."""

    terms: tuple[RuleTerm, ...]
    base_fee_nanos_usd: int
    minimum_nanos_usd: int
    base_fee_applies_to: frozenset[str] = frozenset(OWING_ENDINGS)
    minimum_applies_to: frozenset[str] = frozenset({COMPLETED})

    def base_fee(self, ending: str) -> int:
        """In nano-dollars."""
        return self.base_fee_nanos_usd if ending in self.base_fee_applies_to else 0

    def minimum(self, ending: str) -> int:
        """In nano-dollars."""
        return self.minimum_nanos_usd if ending in self.minimum_applies_to else 0


@dataclass(frozen=True, kw_only=True)
class PricedTerm:
    """`nanos_usd_per_million` is 0 for a fixed amount."""

    description: str
    quantity: int
    nanos_usd_per_million: int
    amount_nanos_usd: int


@dataclass(frozen=True, kw_only=True)
class Price:
    """The terms sum to the total."""

    terms: tuple[PricedTerm, ...]
    minimum_applied: bool = False

    @property
    def total_nanos_usd(self) -> int:
        return sum(term.amount_nanos_usd for term in self.terms)

    @property
    def tokens(self) -> int:
        return sum(term.quantity for term in self.terms if term.nanos_usd_per_million)


def divide_half_even(numerator: int, denominator: int) -> int:
    """Nearest integer; a tie goes to the even neighbour."""
    quotient, remainder = divmod(numerator, denominator)
    if 2 * remainder > denominator or (2 * remainder == denominator and quotient % 2):
        return quotient + 1
    return quotient


def round_to_cent(nanos_usd: int) -> int:
    """Nano-dollars, a whole number of cents."""
    return divide_half_even(nanos_usd, NANOS_USD_PER_CENT) * NANOS_USD_PER_CENT


def in_dollars(nanos_usd: int) -> str:
    """Exact, with at least two decimals: `5.00`, `0.0000061`."""
    whole, fraction = divmod(nanos_usd, NANOS_USD_PER_USD)
    digits = f"{fraction:09d}"
    return f"{whole}.{digits[:2]}{digits[2:].rstrip('0')}"


def token_amount(tokens: int, nanos_usd_per_million: int, *, shared_by: int = 1) -> int:
    """Price of `tokens / shared_by` tokens, rounded once."""
    return divide_half_even(tokens * nanos_usd_per_million, TOKENS_PER_RATE * shared_by)


def check_work(work: Work, limits: Limits) -> None:
    """Raises QuantityInvalid for a count that no job can have."""
    bounds = (
        ("training_tokens", 1, limits.tokens_max),
        ("validation_tokens", 0, limits.tokens_max),
        ("epochs", 1, limits.epochs_max),
        ("evaluations", 0, limits.evaluations_max),
        ("parameter_count", 0, limits.tokens_max),
    )
    for field, lowest, highest in bounds:
        if not lowest <= work.count(field) <= highest:
            raise QuantityInvalid(field, f"must be from {lowest} to {highest}, not {work.count(field)}")


def quote(rule: TuningRule, nanos_usd_per_million: int, work: Work) -> Price:
    """The price of the whole job once it completes. Estimates, holds and settlements all come from here."""
    price = Price(terms=(*terms_of_whole(rule, nanos_usd_per_million, work), *_base_fee(rule, COMPLETED)))
    return at_least_minimum(rule, price)


def price_metered(
    rule: TuningRule, nanos_usd_per_million: int, work: Work, metered: Metered, *, ending: str = COMPLETED
) -> Price:
    """The rule on what was really done, before any minimum; for a whole job it equals the quote before its minimum."""
    fee = () if metered.nothing else _base_fee(rule, ending)
    return Price(terms=(*terms_of_metered(rule, nanos_usd_per_million, work, metered), *fee))


def terms_of_whole(rule: TuningRule, nanos_usd_per_million: int, work: Work) -> tuple[PricedTerm, ...]:
    """All tokens of a job, without fees."""
    terms = []
    for term in rule.terms:
        quantity = work.count(term.tokens) * prod(work.count(factor) for factor in term.times)
        if not all(work.count(factor) for factor in term.left_out):
            # Without evaluations nothing is evaluated, whatever factors the rule multiplies.
            quantity = 0
        terms.append(_token_term(term, quantity, nanos_usd_per_million, token_amount(quantity, nanos_usd_per_million)))
    return tuple(terms)


def terms_of_metered(
    rule: TuningRule, nanos_usd_per_million: int, work: Work, metered: Metered
) -> tuple[PricedTerm, ...]:
    """The tokens of a job that were processed, without fees; no term is above that of the whole job."""
    terms = []
    for term in rule.terms:
        tokens = metered.count(term.tokens)
        # Dividing once at the end keeps a partial run exact: its share of what the whole job would be billed for.
        shared_by = max(1, prod(work.count(factor) for factor in term.left_out))
        amount = token_amount(tokens, nanos_usd_per_million, shared_by=shared_by)
        terms.append(_token_term(term, tokens // shared_by, nanos_usd_per_million, amount))
    return tuple(terms)


def record_amount(rule: TuningRule, nanos_usd_per_million: int, work: Work, tokens: str, count: int) -> int:
    """The amount of one usage record by the rule, 0 where no term bills this kind of token."""
    return sum(
        token_amount(
            count,
            nanos_usd_per_million,
            shared_by=max(1, prod(work.count(factor) for factor in term.left_out)),
        )
        for term in rule.terms
        if term.tokens == tokens
    )


def at_least_minimum(rule: TuningRule, price: Price, *, ending: str = COMPLETED) -> Price:
    missing = rule.minimum(ending) - price.total_nanos_usd
    if missing <= 0:
        return price
    which = "Up to the minimum per completed job" if ending == COMPLETED else "Up to the minimum"
    return Price(terms=(*price.terms, _fixed_term(which, missing)), minimum_applied=True)


def device_minute_nanos_usd(nanos_usd_per_device_hour: int) -> int:
    """The price of a started minute of one device: a sixtieth of its hour, rounded half to even, once."""
    return divide_half_even(nanos_usd_per_device_hour, MINUTES_PER_HOUR)


def _token_term(term: RuleTerm, quantity: int, nanos_usd_per_million: int, amount: int) -> PricedTerm:
    return PricedTerm(
        description=term.description,
        quantity=quantity,
        nanos_usd_per_million=nanos_usd_per_million,
        amount_nanos_usd=amount,
    )


def _base_fee(rule: TuningRule, ending: str) -> tuple[PricedTerm, ...]:
    amount = rule.base_fee(ending)
    return (_fixed_term("Base fee", amount),) if amount else ()


def _fixed_term(description: str, amount: int) -> PricedTerm:
    return PricedTerm(description=description, quantity=1, nanos_usd_per_million=0, amount_nanos_usd=amount)
