"""The arithmetic of one lease of credit: what was granted, what calls have reserved of it, and what they used.

It knows no price, no clock and nobody who grants. `granted` is never below what is used and reserved, so that all calls
together cost at most what billing leased.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Spender(NamedTuple):
    """Who pays for a call, and whose caps bound it."""

    organization_id: str
    project_id: str
    api_key_id: str


@dataclass(kw_only=True, eq=False)
class LeaseAccount:
    """One lease. Amounts are totals since it began, in nano-dollars."""

    lease_id: str
    spender: Spender
    granted: int = 0
    used: int = 0
    reserved: int = 0
    # Counts the changes that billing is told of.
    revision: int = 0
    # Calls that have begun, whether or not they have reserved something yet.
    calls: int = 0
    # What was granted last beyond what calls needed.
    chunk: int = 0
    # Billing is asked to enlarge it; meanwhile nothing is given back, because requests may pass each other.
    growing: bool = False
    # Nothing more can be reserved; what its calls reserved is theirs.
    over: bool = False

    @property
    def free(self) -> int:
        """What the next call can reserve."""
        return 0 if self.over else self.granted - self.used - self.reserved

    @property
    def in_use(self) -> bool:
        """Whether calls may still reserve or use something, or more of it is on its way."""
        return bool(self.calls or self.reserved or self.growing)

    @property
    def runs_low(self) -> bool:
        """Whether it is time to ask for more, before a call has to wait for it."""
        return self.free < self.chunk // 4

    def reserve(self, amount: int) -> bool:
        """False when the lease has less."""
        if amount > self.free:
            return False
        self.reserved += amount
        return True

    def settle(self, reserved: int, used: int) -> None:
        """What was reserved for a call is used or free again."""
        assert 0 <= used <= reserved
        self.reserved -= reserved
        self.used += used

    def total_with(self, amount: int) -> int:
        """What the lease must come to for a call of this amount."""
        return self.used + self.reserved + amount

    def grow(self, granted: int, *, beyond: int) -> None:
        """Billing granted a total; what goes `beyond` a total that calls need is ahead of need. A total never falls."""
        self.chunk = max(0, granted - max(beyond, self.granted))
        self.granted = max(self.granted, granted)

    def shrink(self) -> int:
        """Gives up what no call has reserved; the total that is left."""
        self.granted = self.used + self.reserved
        self.chunk = 0
        return self.granted
