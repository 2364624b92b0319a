"""What a job owes when it ends: the table of endings and the decision. It knows neither balances nor tables."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from services.billing.prices.pricing import (
    Metered,
    Price,
    PricedTerm,
    TuningRule,
    Work,
    at_least_minimum,
    price_metered,
    terms_of_metered,
    terms_of_whole,
)


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
    FINISHED_WORK = enum.auto()
    # The rule on all of the work; must equal the quote.
    QUOTE = enum.auto()


OWED: Mapping[Ending, Owes] = MappingProxyType(
    {
        Ending.COMPLETED: Owes.QUOTE,
        Ending.STOPPED_EARLY: Owes.FINISHED_WORK,
        Ending.CANCELLED_RUNNING: Owes.FINISHED_WORK,
        Ending.USER_FAILURE: Owes.FINISHED_WORK,
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
    """The charge, at most the hold. The hold is the quote, so a completed job is charged exactly its quote.

    The rule says at which endings its base fee and minimum apply; who finished nothing owes neither.
    """
    owes = OWED[ending]
    if owes is Owes.NOTHING or (owes is Owes.FINISHED_WORK and metered.nothing):
        return Settlement(charge_nanos_usd=0, price=Price(terms=()))
    price = price_metered(rule, nanos_usd_per_million, work, metered, ending=ending)
    price = at_least_minimum(rule, price, ending=ending)
    discrepancy = ""
    if owes is Owes.QUOTE and price.total_nanos_usd != held_nanos_usd:
        discrepancy = f"completed work is worth {price.total_nanos_usd} nano-dollars but was quoted {held_nanos_usd}"
    elif owes is Owes.FINISHED_WORK:
        discrepancy = _excess(
            terms_of_metered(rule, nanos_usd_per_million, work, metered),
            terms_of_whole(rule, nanos_usd_per_million, work),
        )
    return Settlement(charge_nanos_usd=min(price.total_nanos_usd, held_nanos_usd), price=price, discrepancy=discrepancy)


def _excess(done: tuple[PricedTerm, ...], quoted: tuple[PricedTerm, ...]) -> str:
    """What a part of the work cannot be: worth more than the whole, before any fee."""
    for part, whole in zip(done, quoted, strict=True):
        if part.amount_nanos_usd > whole.amount_nanos_usd:
            return (
                f"finished work ({part.description}) is worth {part.amount_nanos_usd} nano-dollars"
                f" but only {whole.amount_nanos_usd} were quoted"
            )
    return ""
