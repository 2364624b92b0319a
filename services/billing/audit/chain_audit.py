"""Recomputes the ledger entry by entry: the chain of hashes, the sums of postings, the balances.

It takes rows and returns the first difference. It believes no row and never raises for what a row holds.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from services.billing.audit.difference import Difference, difference
from services.billing.ledger.chain import GENESIS, EntryRow, entry_text, text_hash
from services.billing.ledger.entries import Account, TransactionKind

HASH_CHAIN = "hash chain"
POSTINGS = "postings"
BALANCES = "balances"

# Which way money moves in an entry of each kind: an account that may be in it, and the sign of its posting.
_MOVES: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        TransactionKind.TOP_UP: {Account.FUNDING: -1, Account.PREPAID: 1},
        TransactionKind.HOLD: {Account.PREPAID: -1, Account.HELD: 1},
        TransactionKind.RELEASE: {Account.HELD: -1, Account.PREPAID: 1},
        TransactionKind.SETTLEMENT: {Account.HELD: -1, Account.REVENUE: 1, Account.PREPAID: 1},
        TransactionKind.INFERENCE: {Account.RECEIVABLE: -1, Account.REVENUE: 1},
        TransactionKind.ENDPOINT: {Account.RECEIVABLE: -1, Account.REVENUE: 1},
        TransactionKind.CLUSTER: {Account.RECEIVABLE: -1, Account.REVENUE: 1},
        TransactionKind.CREDIT_NOTE: {Account.REVENUE: -1, Account.PREPAID: 1},
    }
)
_NEVER_ABOVE_ZERO = frozenset({Account.FUNDING, Account.RECEIVABLE})


class Head(NamedTuple):
    """Where a chain stands as it is stored; `posted_position` is that of the last entry whose postings came."""

    position: int
    hash: bytes
    posted_position: int


class ChainAudit:
    """Takes the entries of one organization after the other; `heads` and `balances` are what is stored of them."""

    def __init__(self, heads: Mapping[str, Head], balances: Mapping[str, Mapping[str, int]]) -> None:
        self._heads = heads
        self._balances = balances
        self._left = set(heads) | set(balances)
        self._organization_id: str | None = None
        self._begin()

    def _begin(self) -> None:
        self._position, self._hash = 0, GENESIS
        self._sums: dict[str, int] = {}

    def add(self, row: EntryRow) -> Difference | None:
        if row.organization_id != self._organization_id:
            different = self._end()
            if different is not None:
                return different
            self._organization_id = row.organization_id
            self._begin()
        where = f"organizations/{row.organization_id} transaction {row.position}"
        if row.position != self._position + 1:
            return difference(HASH_CHAIN, where, f"position {self._position + 1}", f"position {row.position}")
        moved = list(zip(row.accounts or (), row.amounts or (), strict=True))
        if row.id is None or row.hash is None or row.transaction_time is None:
            return difference(POSTINGS, where, "a transaction", f"postings alone: {_listed(moved)}")
        text = entry_text(
            id=row.id,
            kind=row.kind or "",
            organization_id=row.organization_id,
            resource=row.resource or "",
            price_book_version=row.price_book_version or "",
            transaction_time=row.transaction_time,
            postings=moved,
        )
        computed = text_hash(self._hash, text)
        wrong = _wrong_postings(row.kind or "", moved)
        if wrong is not None:
            return difference(POSTINGS, where, *wrong)
        if computed != row.hash:
            return difference(HASH_CHAIN, where, computed, row.hash)
        self._position, self._hash = row.position, computed
        for account, amount in moved:
            self._sums[account] = self._sums.get(account, 0) + amount
        return None

    def finish(self) -> Difference | None:
        """After the last entry: also what is stored of organizations that have none."""
        different = self._end()
        if different is not None:
            return different
        self._begin()
        for organization_id in sorted(self._left):
            self._organization_id = organization_id
            different = self._end()
            if different is not None:
                return different
        return None

    def _end(self) -> Difference | None:
        """Compares what the entries of the organization came to with what is stored."""
        organization_id = self._organization_id
        if organization_id is None:
            return None
        self._left.discard(organization_id)
        self._organization_id = None
        where = f"organizations/{organization_id}"
        head = self._heads.get(organization_id)
        if head is None:
            return difference(HASH_CHAIN, f"{where} head", f"position {self._position}", "no chain")
        for position in (head.position, head.posted_position):
            if position != self._position:
                return difference(HASH_CHAIN, f"{where} head", f"position {self._position}", f"position {position}")
        if head.hash != self._hash:
            return difference(HASH_CHAIN, f"{where} head", self._hash, head.hash)
        stored = self._balances.get(organization_id, {})
        for account in sorted({*Account, *stored, *self._sums}):
            posted, balance = self._sums.get(account, 0), stored.get(account)
            if balance != posted:
                return difference(BALANCES, f"{where} account {account}", posted, balance)
            if (balance > 0) if account in _NEVER_ABOVE_ZERO else (balance < 0):
                side = "at most 0" if account in _NEVER_ABOVE_ZERO else "at least 0"
                return difference(BALANCES, f"{where} account {account}", side, balance)
        return None


def _wrong_postings(kind: str, moved: Sequence[tuple[str, int]]) -> tuple[str, str] | None:
    """What is expected and found, where postings cannot be those of an entry of this kind."""
    total = sum(amount for _, amount in moved)
    if total:
        return "a sum of 0", f"a sum of {total}"
    if len(moved) < 2:
        return "at least two", f"{len(moved)}"
    signs = _MOVES.get(kind)
    if signs is None:
        return f"one of {', '.join(_MOVES)}", kind
    for account, amount in moved:
        if amount * signs.get(account, 0) <= 0:
            allowed = ", ".join(f"{account} {'+' if sign > 0 else '-'}" for account, sign in signs.items())
            return f"{kind}: {allowed}", f"{account} {amount}"
    return None


def _listed(moved: Sequence[tuple[str, int]]) -> str:
    return ", ".join(f"{account} {amount}" for account, amount in moved)
