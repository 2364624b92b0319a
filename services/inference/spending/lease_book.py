"""The leases of this replica, one for each spender, and what billing must be told of them. It asks nobody.

Changes of a lease are counted, so that billing can tell a late request from the last one. A lease that is over or given
up is taken out; its calls go on with what they reserved.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from chassis.ids import Ids
from services.inference.spending.lease_account import LeaseAccount, Spender


@dataclass(frozen=True, kw_only=True)
class Returned:
    """The total that a lease comes to now, and whether nothing more will be reserved from it."""

    lease_id: str
    revision: int
    granted: int
    closed: bool


class LeaseBook:
    """`holder` names this replica to billing; a new name begins with no leases."""

    def __init__(self, ids: Ids) -> None:
        self._ids = ids
        self.holder = ids.new("replica")
        self._open: dict[Spender, LeaseAccount] = {}
        # When a lease began and was used last, by the monotonic clock.
        self._began_at: dict[str, float] = {}
        self._used_at: dict[str, float] = {}
        # Taken out, but calls still use what they reserved.
        self._leaving: list[LeaseAccount] = []
        self._returns: dict[str, Returned] = {}

    def account(self, spender: Spender, now: float) -> LeaseAccount:
        """The spender's lease; a new one has nothing yet."""
        account = self._open.get(spender)
        if account is None:
            account = self._open[spender] = LeaseAccount(lease_id=self._ids.new("lease"), spender=spender)
            self._began_at[account.lease_id] = now
        self._used_at[account.lease_id] = now
        return account

    def lose_all(self) -> None:
        """Billing has ended all leases of this holder: the next ones are another holder's."""
        for account in (*self._open.values(), *self._leaving):
            account.over = True
        self._open.clear()
        self._leaving.clear()
        self._began_at.clear()
        self._used_at.clear()
        self._returns.clear()
        self.holder = self._ids.new("replica")

    def next_revision(self, account: LeaseAccount) -> int:
        """For a request that enlarges the lease; what was to be returned of it before is moot."""
        self._returns.pop(account.lease_id, None)
        account.revision += 1
        return account.revision

    def give_up(self, account: LeaseAccount) -> None:
        """Takes out a lease that billing does not enlarge any more."""
        account.over = True
        if self._open.get(account.spender) is account:
            self._take_out(account.spender)

    def give_up_idle(self, now: float, *, idle_s: float, age_s_max: float) -> None:
        """Takes out leases that nobody used for a while, and old ones, which begin anew with the next call."""
        for spender, account in list(self._open.items()):
            idle = not account.in_use and now - self._used_at[account.lease_id] > idle_s
            if idle or now - self._began_at[account.lease_id] > age_s_max:
                self._take_out(spender)

    def give_up_all(self) -> None:
        """Takes out every lease, whatever its calls have reserved: the process stops."""
        for spender in list(self._open):
            self._take_out(spender)
        for account in self._leaving:
            account.used, account.reserved, account.calls = account.total_with(0), 0, 0
            account.growing = False

    def give_back(self, lease_ids: Iterable[str]) -> bool:
        """Gives back what no call has reserved of these leases; False when there is none of them."""
        wanted = set(lease_ids)
        found = [
            account
            for account in (*self._open.values(), *self._leaving)
            if account.lease_id in wanted and not account.growing
        ]
        for account in found:
            self._return(account, closed=False)
        return bool(found)

    def returns(self, row_max: int) -> list[Returned]:
        """What billing must be told next; leases whose calls have ended are closed by it."""
        ended = [account for account in self._leaving if not account.in_use]
        self._leaving = [account for account in self._leaving if account.in_use]
        for account in ended:
            self._return(account, closed=True)
        return list(self._returns.values())[:row_max]

    def told(self, returns: Iterable[Returned]) -> None:
        """Billing knows these."""
        for each in returns:
            if self._returns.get(each.lease_id) == each:
                del self._returns[each.lease_id]

    def _take_out(self, spender: Spender) -> None:
        account = self._open.pop(spender)
        del self._began_at[account.lease_id], self._used_at[account.lease_id]
        # One that was never asked for is nothing that billing knows.
        if account.revision:
            self._leaving.append(account)

    def _return(self, account: LeaseAccount, *, closed: bool) -> None:
        account.revision += 1
        granted = account.shrink()
        self._returns[account.lease_id] = Returned(
            lease_id=account.lease_id, revision=account.revision, granted=granted, closed=closed
        )
