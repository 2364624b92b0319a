"""The ledger in the database: chains, balances and entries. It decides nothing."""

import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Any

from chassis.db.pool import Connection
from chassis.db.queries import load_queries
from services.billing.calendar import OpenMonths, first_of_month
from services.billing.ledger.chain import EntryRow, Link, links
from services.billing.ledger.entries import Account, Balances, Transaction, after

_queries = load_queries(Path(__file__).parent / "queries.sql")


@dataclass
class Standing:
    """Where an organization's money stands while it is locked; `LedgerStore.post` moves it on."""

    head: Link
    balances: Balances


class LedgerStore:
    """The money of organizations."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def lock(self, organization_ids: Iterable[str]) -> dict[str, Standing]:
        """Locks the money of organizations until the end of the transaction, opening what is missing, and reads it.

        Whoever decides about an organization's money does it under this lock; it comes after the lock of a job, always.
        """
        wanted = sorted(set(organization_ids))
        if not wanted:
            return {}
        heads = await self._lock_chains(wanted)
        if len(heads) < len(wanted):
            await _queries.ensure_chains(self._connection, organization_ids=wanted)
            await _queries.ensure_accounts(self._connection, organization_ids=wanted)
            heads = await self._lock_chains(wanted)
        rows: dict[str, list[Any]] = {organization_id: [] for organization_id in wanted}
        # A statement of its own: what it reads is what the holder of the lock before us left behind.
        async for row in _queries.list_balances(self._connection, organization_ids=wanted):
            rows[row["organization_id"]].append(row)
        return {key: Standing(head=heads[key], balances=_balances(rows[key])) for key in wanted}

    async def get_balances(self, organization_id: str) -> Balances:
        return _balances(
            [row async for row in _queries.list_balances(self._connection, organization_ids=[organization_id])]
        )

    async def post(self, standings: dict[str, Standing], entries: Sequence[Transaction]) -> None:
        """Writes ledger transactions, each after the last of its organization.

        `standings` come from `lock` and are moved on.
        """
        if not entries:
            return
        linked: list[tuple[Transaction, Link]] = []
        for organization_id in sorted({entry.organization_id for entry in entries}):
            own = [entry for entry in entries if entry.organization_id == organization_id]
            made = links(standings[organization_id].head, own)
            linked += zip(own, made, strict=True)
            standings[organization_id].head = made[-1]
            standings[organization_id].balances = after(standings[organization_id].balances, own)
        await _queries.insert_transactions(
            self._connection,
            ids=[entry.id for entry, _ in linked],
            kinds=[entry.kind for entry, _ in linked],
            organization_ids=[entry.organization_id for entry, _ in linked],
            resources=[entry.resource for entry, _ in linked],
            price_book_versions=[entry.price_book_version for entry, _ in linked],
            transaction_times=[entry.transaction_time for entry, _ in linked],
            positions=[link.position for _, link in linked],
            hashes=[link.hash for _, link in linked],
        )
        postings = [(entry, link, posting) for entry, link in linked for posting in entry.postings]
        await _queries.insert_postings(
            self._connection,
            organization_ids=[entry.organization_id for entry, _, _ in postings],
            positions=[link.position for _, link, _ in postings],
            accounts=[posting.account for _, _, posting in postings],
            amounts=[posting.amount_nanos_usd for _, _, posting in postings],
        )

    async def get_posted_amount(self, transaction_id: uuid.UUID, account: Account) -> int | None:
        amount: int | None = await _queries.get_posted_amount(
            self._connection, transaction_id=transaction_id, account=account
        )
        return amount

    async def list_transaction_ids(self, resource: str) -> list[uuid.UUID]:
        return [row["id"] async for row in _queries.list_transaction_ids(self._connection, resource=resource)]

    async def closed_months(self, organization_ids: Sequence[str]) -> dict[str, frozenset[date]]:
        """The first days of the months whose invoices are closed, for each organization that was asked for.

        It stays true for as long as the chains of these organizations are locked.
        """
        found: dict[str, set[date]] = {organization_id: set() for organization_id in organization_ids}
        async for row in _queries.list_closed_months(self._connection, organization_ids=sorted(found)):
            found[row["organization_id"]].add(row["billing_month"])
        return {organization_id: frozenset(months) for organization_id, months in found.items()}

    async def open_months(
        self, organization_ids: Sequence[str], moments: Iterable[datetime], now: datetime
    ) -> OpenMonths:
        """Which month's invoice gets what is booked now.

        `moments` holds at least the earliest one that will be asked for. The running month cannot be closed, so nothing
        is read when no moment lies before it.
        """
        running = first_of_month(now)
        if all(first_of_month(moment) >= running for moment in moments):
            return OpenMonths({}, now)
        return OpenMonths(await self.closed_months(organization_ids), now)

    async def get_revenue(self, organization_id: str) -> int:
        """What was earned from the organization so far, in nano-dollars."""
        return await _queries.get_revenue(self._connection, organization_id=organization_id) or 0

    async def list_journal(self, organization_id: str, *, after_position: int, row_max: int) -> Sequence[EntryRow]:
        """A page of the journal in the order of the chain."""
        rows = _queries.list_journal(
            self._connection, organization_id=organization_id, after_position=after_position, row_max=row_max
        )
        return [EntryRow._make(row) async for row in rows]

    async def dump(self) -> AsyncIterator[tuple[Any, ...]]:
        """Every posting with its transaction, without the chain: the same for the same events in any order."""
        async for row in _queries.dump_ledger(self._connection):
            yield tuple(row)

    async def _lock_chains(self, organization_ids: list[str]) -> dict[str, Link]:
        rows = _queries.lock_chains(self._connection, organization_ids=organization_ids)
        return {row["organization_id"]: Link(position=row["position"], hash=row["hash"]) async for row in rows}


def _balances(rows: Iterable[Any]) -> Balances:
    amounts = {row["account"]: row["balance_nanos_usd"] for row in rows}
    return Balances(
        prepaid_nanos_usd=amounts.get(Account.PREPAID, 0),
        held_nanos_usd=amounts.get(Account.HELD, 0),
        receivable_nanos_usd=amounts.get(Account.RECEIVABLE, 0),
    )
