"""How much credit a lease gets: pure decisions about amounts. It knows no table and no clock.

What is leased and not used yet is taken away from everybody else, so all leases together and all holds never exceed
what is available or a cap.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from services.billing.budgets.caps import Budget, Spender, room_under


@dataclass(frozen=True, kw_only=True)
class CreditLease:
    """What was granted to a holder for one spender, and how much of it is booked as used."""

    lease_id: str
    holder: str
    organization_id: str
    project_id: str
    api_key_id: str
    granted_nanos_usd: int
    used_nanos_usd: int
    revision: int
    closed_time: datetime | None

    @property
    def outstanding_nanos_usd(self) -> int:
        """What the lease takes away from others."""
        return max(0, self.granted_nanos_usd - self.used_nanos_usd)


@dataclass(frozen=True, kw_only=True)
class Leased:
    """What all leases of an organization take away, and those of each spender that was asked for."""

    nanos_usd: int = 0
    by_spender: Mapping[Spender, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What a holder wants a lease to come to: without which it is of no use, for calls that wait, and ahead of need."""

    required_nanos_usd: int
    needed_nanos_usd: int
    wanted_nanos_usd: int


@dataclass(frozen=True, kw_only=True)
class Room:
    """What can still be leased. `budget` is the one whose cap leaves that little; None when it is the credit."""

    nanos_usd: int
    budget: Budget | None = None


def room_of(available_nanos_usd: int, budgets: Iterable[Budget], leased: Leased) -> Room:
    """The least that credit and caps leave."""
    credit = Room(nanos_usd=max(0, available_nanos_usd - leased.nanos_usd))
    tightest = room_under(budgets, leased.by_spender)
    if tightest is None or tightest[1] >= credit.nanos_usd:
        return credit
    return Room(nanos_usd=tightest[1], budget=tightest[0])


def grown(room: Room, wish: Wish, *, granted_nanos_usd: int, share: int) -> int:
    """The total of a lease after a grant, or what it was when the room is too small for what is required.

    Beyond what calls wait for a grant takes at most one part in `share` of the room, so that no lease locks away what
    others need. A lease never shrinks here: only its holder knows what it has reserved.
    """
    required, needed, wanted = (
        max(0, total - granted_nanos_usd)
        for total in (wish.required_nanos_usd, wish.needed_nanos_usd, wish.wanted_nanos_usd)
    )
    if required > room.nanos_usd:
        return granted_nanos_usd
    return granted_nanos_usd + max(required, min(needed, room.nanos_usd), min(wanted, room.nanos_usd // share))
