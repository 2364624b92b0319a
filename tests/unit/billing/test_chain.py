"""The chain of hashes: each entry seals what came before it, and every part of an entry counts."""

import dataclasses
import hashlib
import uuid
from datetime import UTC, datetime
from typing import Any

import pytest

from services.billing.ledger import entries
from services.billing.ledger.chain import GENESIS, Link, entry_hash, links
from services.billing.ledger.entries import Account, Posting, Transaction, TransactionKind

ENTRY = Transaction(
    id=uuid.UUID("00000000-0000-0000-0000-00000000002a"),
    kind=TransactionKind.HOLD,
    organization_id="o",
    resource="projects/p/tuningJobs/ft-1",
    price_book_version="default-2026-1",
    transaction_time=datetime(2026, 11, 23, 5, 0, 0, 1, tzinfo=UTC),
    postings=(
        Posting(account=Account.PREPAID, amount_nanos_usd=-5),
        Posting(account=Account.HELD, amount_nanos_usd=5),
    ),
)


def test_the_formula_is_the_documented_one() -> None:
    text = (
        "00000000-0000-0000-0000-00000000002a\nhold\no\nprojects/p/tuningJobs/ft-1\ndefault-2026-1\n"
        "1795410000000001\nheld 5\nprepaid -5"
    )
    assert entry_hash(GENESIS, ENTRY) == hashlib.sha256(bytes(32) + text.encode()).digest()


@pytest.mark.parametrize(
    "change",
    [
        {"id": uuid.UUID(int=1)},
        {"kind": TransactionKind.RELEASE},
        {"organization_id": "p"},
        {"resource": "projects/p/tuningJobs/ft-2"},
        {"price_book_version": ""},
        {"transaction_time": datetime(2026, 11, 23, 5, 0, 0, 2, tzinfo=UTC)},
        {
            "postings": (
                Posting(account=Account.PREPAID, amount_nanos_usd=-6),
                Posting(account=Account.HELD, amount_nanos_usd=6),
            )
        },
    ],
)
def test_every_part_of_an_entry_counts(change: dict[str, Any]) -> None:
    assert entry_hash(GENESIS, dataclasses.replace(ENTRY, **change)) != entry_hash(GENESIS, ENTRY)


def test_the_order_of_postings_does_not_count() -> None:
    turned = dataclasses.replace(ENTRY, postings=ENTRY.postings[::-1])
    assert entry_hash(GENESIS, turned) == entry_hash(GENESIS, ENTRY)


def test_links_go_on_from_the_head_and_seal_what_came_before() -> None:
    booked = [
        entries.top_up(organization_id="o", amount_nanos_usd=5, request_id=str(number), now=ENTRY.transaction_time)
        for number in range(3)
    ]
    made = links(Link(), booked)
    assert [link.position for link in made] == [1, 2, 3]
    assert links(made[0], booked[1:]) == made[1:]
    changed = links(Link(), [ENTRY, *booked[1:]])
    assert all(one.hash != other.hash for one, other in zip(made, changed, strict=True))
