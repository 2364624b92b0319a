"""A journal in beancount's format, so that an independent program can find it balanced. Lines in, lines out; it reads
no file and checks nothing itself.

The accounts are those of the customer's own books, whose signs are the ledger's: what was paid in is an asset, what is
owed a liability, what was charged an expense.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import UTC, date, timedelta

from finemesh.billing.v1.ledger_service_pb2 import JournalEntry

CURRENCY = "USD"
NANOS_PER_DOLLAR = 1_000_000_000
ACCOUNTS = {
    "funding": "Equity:Finemesh:Funding",
    "prepaid": "Assets:Finemesh:Prepaid",
    "held": "Assets:Finemesh:Held",
    "receivable": "Liabilities:Finemesh:Owed",
    "revenue": "Expenses:Finemesh:Usage",
}


class Beancount:
    """Writes a journal entry by entry, in constant memory: `begin`, `entry` for each, then `end`."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._balances: dict[str, int] = {}
        self._first: date | None = None
        self._last: date | None = None

    def begin(self) -> str:
        # Nine decimals everywhere: half a nano-dollar is what beancount then tolerates, so sums must be exact.
        return (
            f'option "title" "{_quoted(self._title)}"\n'
            f'option "operating_currency" "{CURRENCY}"\n'
            'option "tolerance_multiplier" "0.5"\n'
        )

    def entry(self, entry: JournalEntry) -> str:
        moment = entry.transaction_time.ToDatetime(tzinfo=UTC)
        day = moment.date()
        self._first = min(self._first or day, day)
        self._last = max(self._last or day, day)
        lines = [
            f'{day} * "{_quoted(entry.kind)}" "{_quoted(entry.resource)}"',
            f"  position: {entry.position}",
            f'  transaction: "{_quoted(entry.transaction_id)}"',
            f'  time: "{moment.isoformat()}"',
            f'  pricebook: "{_quoted(entry.price_book_version)}"',
            f'  hash: "{_quoted(entry.hash)}"',
        ]
        for posting in entry.postings:
            account = ACCOUNTS[posting.account]
            self._balances[account] = self._balances.get(account, 0) + posting.amount_nanos_usd
            lines.append(f"  {account}  {amount(posting.amount_nanos_usd)} {CURRENCY}")
        return "\n" + "\n".join(lines) + "\n"

    def end(self) -> str:
        """Opens the accounts on the first day and asserts their balances on the day after the last."""
        if self._first is None or self._last is None:
            return ""
        opened = [f"{self._first} commodity {CURRENCY}\n"]
        opened += [f"{self._first} open {account} {CURRENCY}\n" for account in ACCOUNTS.values()]
        after = self._last + timedelta(days=1)
        asserted = [
            # Without a tolerance of its own an assertion would let one nano-dollar pass.
            f"{after} balance {account}  {amount(balance)} ~ 0 {CURRENCY}\n"
            for account, balance in sorted(self._balances.items())
        ]
        return "\n" + "".join(opened) + "\n" + "".join(asserted)


def render(title: str, entries: Iterable[JournalEntry]) -> Iterator[str]:
    """The whole file in pieces."""
    book = Beancount(title)
    yield book.begin()
    for entry in entries:
        yield book.entry(entry)
    yield book.end()


def amount(nanos_usd: int) -> str:
    """Exact dollars with nine decimals: `-5.000000001`."""
    sign = "-" if nanos_usd < 0 else ""
    whole, rest = divmod(abs(nanos_usd), NANOS_PER_DOLLAR)
    return f"{sign}{whole}.{rest:09d}"


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")
