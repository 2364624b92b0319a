"""The ledger in thirty lines: what an organization's entries, read in the order of their chain, must add up to.

It is written from docs/ledger.md and not from the code that it checks, so that the two can disagree.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from chassis.db.pool import Pool
from services.billing.ledger.chain import GENESIS, entry_text, text_hash


@dataclass
class Books:
    """Balances after some prefix of the chain, and who holds what."""

    prepaid: int = 0
    held: int = 0
    receivable: int = 0
    revenue: int = 0
    funding: int = 0
    holds: dict[str, int] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)
    charged: dict[str, int] = field(default_factory=dict)
    # What could be spent, and what was earned, after each entry; the first before any.
    available: list[int] = field(default_factory=lambda: [0])
    earned: list[int] = field(default_factory=lambda: [0])

    def apply(self, kind: str, resource: str, moved: Mapping[str, int]) -> None:
        free = self.available[-1]
        assert sum(moved.values()) == 0
        for account, amount in moved.items():
            setattr(self, account, getattr(self, account) + amount)
        accounts = set(moved)
        if kind == "top_up":
            assert accounts == {"funding", "prepaid"} and moved["prepaid"] > 0
        elif kind == "hold":
            assert accounts == {"prepaid", "held"} and 0 < moved["held"] <= free, "more was held than was free"
            assert resource not in self.holds and resource not in self.ended, "a job was held twice"
            self.holds[resource] = moved["held"]
        elif kind in ("settlement", "release"):
            assert accounts <= {"prepaid", "held", "revenue"}
            assert -moved["held"] == self.holds.pop(resource), "a hold ended that was not held, or as another amount"
            self.ended[resource] = kind
            self.charged[resource] = moved.get("revenue", 0)
            assert kind == "settlement" or not self.charged[resource]
        elif kind in ("inference", "endpoint", "cluster"):
            assert accounts == {"receivable", "revenue"} and moved["revenue"] > 0
        elif kind == "credit_note":
            assert accounts == {"revenue", "prepaid"} and moved["prepaid"] > 0
        else:
            raise AssertionError(f"{kind} is no kind of entry")
        assert self.prepaid >= 0 and self.revenue >= 0, "a balance went below zero"
        assert self.receivable <= 0 and self.funding <= 0
        assert self.held == sum(self.holds.values())
        self.available.append(max(0, self.prepaid + self.receivable))
        self.earned.append(self.revenue)


@dataclass
class Read:
    """One organization as the database has it."""

    books: Books
    entries: list[Any]
    accounts: dict[str, int]
    holds: dict[str, Any]


async def read(pool: Pool, organization: str) -> Read:
    """Replays the chain link by link, and fails at the first entry that cannot follow the ones before it."""
    entries = await pool.fetch(
        "SELECT *, (SELECT jsonb_object_agg(account, amount_nanos_usd) FROM postings"
        " WHERE postings.organization_id = t.organization_id AND postings.position = t.position) AS moved"
        " FROM transactions AS t WHERE organization_id = $1 ORDER BY position",
        organization,
    )
    books, last = Books(), GENESIS
    for position, entry in enumerate(entries, start=1):
        assert entry["position"] == position, "the chain has a gap"
        named = ("id", "kind", "organization_id", "resource", "price_book_version", "transaction_time")
        last = text_hash(last, entry_text(**{name: entry[name] for name in named}, postings=entry["moved"].items()))
        assert entry["hash"] == last, f"the chain breaks at {position}"
        books.apply(entry["kind"], entry["resource"], entry["moved"])
    head = await pool.fetchrow("SELECT position, hash FROM chains WHERE organization_id = $1", organization)
    assert (tuple(head) if head else (0, GENESIS)) == (len(entries), last)
    accounts = await pool.fetch(
        "SELECT account, balance_nanos_usd FROM accounts WHERE organization_id = $1", organization
    )
    holds = await pool.fetch("SELECT * FROM holds WHERE organization_id = $1", organization)
    return Read(
        books=books,
        entries=entries,
        accounts={row["account"]: row["balance_nanos_usd"] for row in accounts},
        holds={row["resource"]: row for row in holds},
    )


def of_kind(entries: Iterable[Any], *kinds: str) -> list[Any]:
    return [entry for entry in entries if entry["kind"] in kinds]
