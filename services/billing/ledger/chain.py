"""The chain of hashes over an organization's ledger: each entry seals everything before it. It books nothing.

Whoever has the journal can compute the same hashes with any SHA-256; docs/ledger.md has the formula in words.
"""

import hashlib
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

from services.billing.ledger.entries import Transaction

GENESIS = bytes(32)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, kw_only=True)
class Link:
    """Where an entry stands in its organization's chain: `position` counts from 1, `hash` has 32 bytes."""

    position: int = 0
    hash: bytes = GENESIS


def entry_text(
    *,
    id: uuid.UUID,
    kind: str,
    organization_id: str,
    resource: str,
    price_book_version: str,
    transaction_time: datetime,
    postings: Iterable[tuple[str, int]],
) -> str:
    """What is hashed of an entry, in any order of its postings: account and amount of each, in nano-dollars.

    No part can hold a line break, so two entries never have the same text.
    """
    micros = (transaction_time - _EPOCH) // datetime.resolution
    moved = (f"{account} {amount}" for account, amount in sorted(postings))
    return "\n".join((str(id), kind, organization_id, resource, price_book_version, str(micros), *moved))


def text_hash(previous: bytes, text: str) -> bytes:
    """SHA-256 over the 32 bytes of the hash before it and the entry's text in UTF-8."""
    return hashlib.sha256(previous + text.encode()).digest()


def entry_hash(previous: bytes, entry: Transaction) -> bytes:
    """The hash of an entry that comes after the one with the hash `previous`."""
    text = entry_text(
        id=entry.id,
        kind=entry.kind,
        organization_id=entry.organization_id,
        resource=entry.resource,
        price_book_version=entry.price_book_version,
        transaction_time=entry.transaction_time,
        postings=[(posting.account, posting.amount_nanos_usd) for posting in entry.postings],
    )
    return text_hash(previous, text)


def links(head: Link, entries: Iterable[Transaction]) -> list[Link]:
    """The links of new entries of one organization, in their order, after `head`."""
    made = []
    for entry in entries:
        head = Link(position=head.position + 1, hash=entry_hash(head.hash, entry))
        made.append(head)
    return made


class EntryRow(NamedTuple):
    """A ledger transaction with its postings, in the order of the chain; `id` is None for postings without one."""

    organization_id: str
    position: int
    id: uuid.UUID | None
    kind: str | None
    resource: str | None
    price_book_version: str | None
    transaction_time: datetime | None
    hash: bytes | None
    accounts: Sequence[str] | None
    amounts: Sequence[int] | None
