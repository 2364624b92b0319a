"""Whether an organization's prepaid credit is enough to go on: the table of states and the decision.

It knows what is available and the threshold of a warning; it knows no table, no event and nobody who acts on a state.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass

from services.billing.ledger.entries import Balances


class CreditState(enum.StrEnum):
    """As the contract's CreditState, without the prefix."""

    SUFFICIENT = "SUFFICIENT"
    LOW = "LOW"
    EXHAUSTED = "EXHAUSTED"


@dataclass(frozen=True, kw_only=True)
class Band:
    """`holds(available, low_balance)`, both in nano-dollars, says whether the state fits."""

    state: CreditState
    holds: Callable[[int, int], bool]


# Read from the top: the first that fits is the state, and the last one always fits.
BANDS: tuple[Band, ...] = (
    Band(state=CreditState.EXHAUSTED, holds=lambda available, _: available <= 0),
    Band(state=CreditState.LOW, holds=lambda available, low_balance: available < low_balance),
    Band(state=CreditState.SUFFICIENT, holds=lambda _, __: True),
)


@dataclass(frozen=True, kw_only=True)
class Credit:
    """What was announced of an organization last, beside its balances now. `state` None: nothing was announced yet."""

    organization_id: str
    balances: Balances
    low_balance_nanos_usd: int
    state: CreditState | None
    revision: int


@dataclass(frozen=True, kw_only=True)
class CreditChange:
    """A state to announce; a higher revision is a later one."""

    organization_id: str
    from_state: CreditState | None
    to_state: CreditState
    balances: Balances
    revision: int


def state_of(balances: Balances, low_balance_nanos_usd: int) -> CreditState:
    """What is held for jobs is not available: it is spent already unless a job gives it back."""
    available = balances.available_nanos_usd
    return next(band.state for band in BANDS if band.holds(available, low_balance_nanos_usd))


def change_of(credit: Credit) -> CreditChange | None:
    """None while the state is the one that was announced."""
    state = state_of(credit.balances, credit.low_balance_nanos_usd)
    if state is credit.state:
        return None
    return CreditChange(
        organization_id=credit.organization_id,
        from_state=credit.state,
        to_state=state,
        balances=credit.balances,
        revision=credit.revision + 1,
    )
