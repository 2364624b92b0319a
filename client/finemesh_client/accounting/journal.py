"""A journal that was exported, and its recomputation without any server: hashes, sums and balances by the formula of
docs/ledger.md. It trusts no field and asks nobody.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from google.protobuf import json_format

from finemesh.billing.v1.ledger_service_pb2 import JournalEntry

# What stands before the first entry of an organization: the hash of nothing.
GENESIS = bytes(32)
# Accounts on which no balance may be above zero; on every other none may be below.
NEVER_ABOVE_ZERO = frozenset({"funding", "receivable"})
ACCOUNTS = frozenset({"funding", "prepaid", "held", "receivable", "revenue"})


class JournalUnreadable(ValueError):
    """A line that is no entry; the message begins with its number."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first place where the journal does not agree with itself."""

    check: str
    location: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.check}: {self.location}: expected {self.expected}, found {self.found}"


@dataclass(kw_only=True)
class Recomputed:
    """What the entries add up to: balances in nano-dollars by account."""

    organization_id: str = ""
    entry_count: int = 0
    head: bytes = GENESIS
    balances: dict[str, int] = field(default_factory=dict)


def write_line(entry: JournalEntry) -> str:
    """One line of JSON with the contract's own field names; 64-bit numbers are strings, as protobuf has it."""
    described = json_format.MessageToDict(
        entry, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return json.dumps(described, ensure_ascii=False, separators=(",", ":")) + "\n"


def read_lines(lines: Iterable[str]) -> Iterator[JournalEntry]:
    """The entries of a file, one after the other; JournalUnreadable at the first line that is none."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield json_format.Parse(line, JournalEntry())
        except json_format.ParseError as error:
            raise JournalUnreadable(f"line {number}: {error}") from None


def entry_hash(previous: bytes, entry: JournalEntry) -> bytes:
    """SHA-256 over the hash before it and the entry's lines: id, kind, organization, resource, version of the price
    book, microseconds since 1970, and `account amount` for each posting, sorted by account."""
    microseconds = entry.transaction_time.seconds * 1_000_000 + entry.transaction_time.nanos // 1_000
    postings = sorted((posting.account, posting.amount_nanos_usd) for posting in entry.postings)
    lines = [
        entry.transaction_id,
        entry.kind,
        entry.organization_id,
        entry.resource,
        entry.price_book_version,
        str(microseconds),
        *(f"{account} {amount}" for account, amount in postings),
    ]
    return hashlib.sha256(previous + "\n".join(lines).encode()).digest()


def recompute(entries: Iterable[JournalEntry], sums: Recomputed) -> Difference | None:
    """Adds a whole journal, from position 1, to `sums`; the first difference, or None when everything agrees."""
    for entry in entries:
        different = _add(entry, sums)
        if different is not None:
            return different
    return _wrong_side(sums.balances)


def _add(entry: JournalEntry, sums: Recomputed) -> Difference | None:
    where = f"transaction {entry.position} ({entry.transaction_id})"
    if entry.position != sums.entry_count + 1:
        return _difference("position", where, sums.entry_count + 1, entry.position)
    sums.organization_id = sums.organization_id or entry.organization_id
    if entry.organization_id != sums.organization_id:
        return _difference("organization", where, sums.organization_id, entry.organization_id)
    accounts = [posting.account for posting in entry.postings]
    if len(accounts) < 2 or len(set(accounts)) < len(accounts) or not set(accounts) <= ACCOUNTS:
        return _difference("postings", where, "two or more known accounts, each once", " ".join(accounts) or "none")
    total = sum(posting.amount_nanos_usd for posting in entry.postings)
    if total:
        return _difference("sum of postings", where, 0, total)
    computed = entry_hash(sums.head, entry)
    if computed.hex() != entry.hash:
        return _difference("hash chain", where, computed.hex(), entry.hash)
    for posting in entry.postings:
        sums.balances[posting.account] = sums.balances.get(posting.account, 0) + posting.amount_nanos_usd
    sums.entry_count, sums.head = entry.position, computed
    return None


def _wrong_side(balances: Mapping[str, int]) -> Difference | None:
    for account, balance in sorted(balances.items()):
        if account in NEVER_ABOVE_ZERO and balance > 0:
            return _difference("balance", account, "at most 0", balance)
        if account not in NEVER_ABOVE_ZERO and balance < 0:
            return _difference("balance", account, "at least 0", balance)
    return None


def _difference(check: str, location: str, expected: object, found: object) -> Difference:
    return Difference(check=check, location=location, expected=str(expected), found=str(found))
