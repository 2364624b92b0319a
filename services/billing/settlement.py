"""What a job owes when it ends: the table of endings and the decision, pure. It knows neither balances nor tables."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from services.billing.pricing import Metered, Price, TuningRule, Work, at_least_minimum, price_metered


class Ending(enum.StrEnum):
    """How a job ended, as far as money is concerned."""

    COMPLETED = "completed"
    STOPPED_EARLY = "stopped_early"
    CANCELLED_RUNNING = "cancelled_running"
    CANCELLED_BEFORE_RUN = "cancelled_before_run"
    PLATFORM_FAILURE = "platform_failure"
    USER_FAILURE = "user_failure"
    REFUSED = "refused"


class Owes(enum.Enum):
    NOTHING = enum.auto()
    # The rule on the steps and evaluations that were finished.
    RULE = enum.auto()
    # The same, and at least the minimum; must equal the quote.
    RULE_WITH_MINIMUM = enum.auto()


OWED: Mapping[Ending, Owes] = MappingProxyType(
    {
        Ending.COMPLETED: Owes.RULE_WITH_MINIMUM,
        Ending.STOPPED_EARLY: Owes.RULE,
        Ending.CANCELLED_RUNNING: Owes.RULE,
        Ending.USER_FAILURE: Owes.RULE,
        Ending.CANCELLED_BEFORE_RUN: Owes.NOTHING,
        Ending.PLATFORM_FAILURE: Owes.NOTHING,
        Ending.REFUSED: Owes.NOTHING,
    }
)


@dataclass(frozen=True, kw_only=True)
class Settlement:
    """`price` shows how the amount came about; `discrepancy` is empty unless the numbers contradict the quote."""

    charge_nanos_usd: int
    price: Price
    discrepancy: str = ""


def needs_all_usage(ending: Ending) -> bool:
    """False where nothing is owed: such a hold need not wait for records that are still on their way."""
    return OWED[ending] is not Owes.NOTHING


def settle(
    *, ending: Ending, held_nanos_usd: int, rule: TuningRule, nanos_usd_per_million: int, work: Work, metered: Metered
) -> Settlement:
    """The charge, at most the hold. The hold is the quote, so a completed job is charged exactly its quote."""
    owes = OWED[ending]
    if owes is Owes.NOTHING:
        return Settlement(charge_nanos_usd=0, price=Price(terms=()))
    price = price_metered(rule, nanos_usd_per_million, work, metered)
    if owes is Owes.RULE_WITH_MINIMUM:
        price = at_least_minimum(rule, price)
    total = price.total_nanos_usd
    discrepancy = ""
    if owes is Owes.RULE_WITH_MINIMUM and total != held_nanos_usd:
        discrepancy = f"completed work is worth {total} nano-dollars but was quoted {held_nanos_usd}"
    elif total > held_nanos_usd:
        discrepancy = f"finished work is worth {total} nano-dollars but only {held_nanos_usd} were quoted"
    return Settlement(charge_nanos_usd=min(total, held_nanos_usd), price=price, discrepancy=discrepancy)
