"""Verifies the ledger of one organization or of all, up to the first difference. Not pure: database.

It reads one snapshot, feeds the other modules of this room with it, counts, and tells how far it is. They decide what
agrees and what does not. Damaged rows are differences too: nothing that a row holds ends a verification with an error.
"""

from collections.abc import AsyncIterator, Collection, Mapping
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

import asyncpg
import structlog

from chassis.db.pool import Connection, Pool, database_is_away
from services.billing.audit.chain_audit import BALANCES, HASH_CHAIN, ChainAudit
from services.billing.audit.difference import Difference, difference
from services.billing.audit.document_audit import CREDIT_NOTES, INVOICES, CreditNotesAudit
from services.billing.audit.grouped import Grouped
from services.billing.audit.hold_audit import HOLDS
from services.billing.audit.invoice_audit import InvoiceAudit
from services.billing.audit.job_audit import JobsAudit
from services.billing.audit.store import AuditStore
from services.billing.audit.usage_audit import PRICE_BOOKS, USAGE, UsageAudit, UsageRow
from services.billing.prices.parse import read_book
from services.billing.prices.pricebook import PriceBook
from services.billing.prices.store import PriceStore
from services.billing.prices.yaml import BookInvalid

USAGE_SUMS = "usage sums"
NUMBERS = "document numbers"
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What is being checked, and what was so far; `difference` ends it."""

    check: str = ""
    transactions: int = 0
    usage_records: int = 0
    holds: int = 0
    invoices: int = 0
    difference: Difference | None = None


class _FoundError(Exception):
    def __init__(self, difference: Difference) -> None:
        super().__init__(difference)
        self.difference = difference


class Verification:
    """One run. `progress` is where it stands; `run` moves it on and returns at the end or at the first difference."""

    def __init__(
        self, pool: Pool, organization_id: str | None, *, batch_rows: int, timeout_s: float, names_scan_max: int
    ) -> None:
        self._pool = pool
        self._names_scan_max = names_scan_max
        self._organization_id = organization_id
        self._batch_rows = batch_rows
        self._timeout_s = timeout_s
        self.progress = Progress()

    async def run(self) -> AsyncIterator[None]:
        """Yields after each batch of rows, so that whoever waits can look at `progress`."""
        async with (
            self._pool.acquire() as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            reader = AuditStore(
                connection, self._organization_id, batch_rows=self._batch_rows, timeout_s=self._timeout_s
            )
            await reader.begin()
            try:
                async for _ in self._checks(connection, reader):
                    yield
            except _FoundError as found:
                self._found(found.difference)
            except Exception as error:
                if not _tells_of_rows(error):
                    raise
                _log.exception("verification_met_damage", check=self.progress.check)
                where = self._organization_id or "all organizations"
                self._found(difference(self.progress.check, where, "rows that can be read", repr(error)))

    async def _checks(self, connection: Connection, reader: AuditStore) -> AsyncIterator[None]:
        self._begin(PRICE_BOOKS)
        books = _read_books(await PriceStore(connection).list_books())
        closed = await reader.closed_months()
        balances = await reader.balances()
        async for _ in self._chain(reader, balances):
            yield
        async for _ in self._jobs(reader, JobsAudit(books, closed), balances):
            yield
        async for _ in self._usage(reader, UsageAudit(books, closed)):
            yield
        self._begin(USAGE_SUMS)
        yield
        _stop(_wrong_sum(await reader.wrong_sum()))
        audit = InvoiceAudit(connection, reader, names_scan_max=self._names_scan_max)
        async for _ in self._documents(reader, audit, closed):
            yield

    async def _chain(self, reader: AuditStore, balances: Mapping[str, Mapping[str, int]]) -> AsyncIterator[None]:
        self._begin(HASH_CHAIN)
        audit = ChainAudit(await reader.heads(), balances)
        count = 0
        async for entry in reader.entries():
            _stop(audit.add(entry))
            count += 1
            if count % self._batch_rows == 0:
                self._count(transactions=count)
                yield
        self._count(transactions=count)
        self._begin(BALANCES)
        _stop(audit.finish())

    async def _jobs(
        self, reader: AuditStore, audit: JobsAudit, balances: Mapping[str, Mapping[str, int]]
    ) -> AsyncIterator[None]:
        self._begin(HOLDS)
        usage = Grouped(reader.job_usage(), lambda row: row.resource)
        entries = Grouped(reader.job_entries(), lambda row: row.resource)
        holds = records = 0
        async for hold in reader.holds():
            if (record := await usage.before(hold.resource)) is not None:
                _stop(audit.stray_record(record))
            if (entry := await entries.before(hold.resource)) is not None:
                _stop(audit.stray_entry(entry))
            used = await usage.take(hold.resource)
            _stop(audit.job(hold, used, await entries.take(hold.resource)))
            holds, records = holds + 1, records + len(used)
            self._count(holds=holds, usage_records=records)
            if holds % self._batch_rows == 0:
                yield
        if (record := await usage.rest()) is not None:
            _stop(audit.stray_record(record))
        if (entry := await entries.rest()) is not None:
            _stop(audit.stray_entry(entry))
        _stop(audit.finish(balances))

    async def _usage(self, reader: AuditStore, audit: UsageAudit) -> AsyncIterator[None]:
        self._begin(USAGE)
        usage = Grouped(reader.served_usage(), lambda row: row.transaction_id)
        count = self.progress.usage_records
        while (row := await usage.rest()) is not None and row.transaction_id is None:
            usage.drop()
            _stop(audit.record(row) or audit.unposted(row))
            count += 1
            if count % self._batch_rows == 0:
                self._count(usage_records=count)
                yield
        seen = 0
        async for entry in reader.served_entries():
            if (row := await usage.before(entry.id)) is not None:
                _stop(audit.lost(row))
            records: list[UsageRow] = await usage.take(entry.id)
            for row in records:
                _stop(audit.record(row))
            _stop(audit.entry(entry, records))
            count, seen = count + len(records), seen + 1
            self._count(usage_records=count)
            if seen % self._batch_rows == 0:
                yield
        if (row := await usage.rest()) is not None:
            _stop(audit.lost(row))
        self._count(usage_records=count)

    async def _documents(
        self, reader: AuditStore, audit: InvoiceAudit, closed: Mapping[str, Collection[date]]
    ) -> AsyncIterator[None]:
        self._begin(INVOICES)
        notes = CreditNotesAudit(closed)
        count = 0
        async for row in reader.invoices():
            _stop(await audit.invoice(row))
            notes.invoice(row)
            count += 1
            self._count(invoices=count)
            yield
        self._begin(CREDIT_NOTES)
        async for note in reader.credit_notes():
            _stop(notes.note(note))
        if self._organization_id is not None:
            # Numbers are of all organizations together: one of them alone has gaps.
            return
        self._begin(NUMBERS)
        if (wrong := await reader.wrong_number()) is not None:
            _stop(difference(NUMBERS, wrong["kind"], f"number {wrong['place']}", f"number {wrong['number']}"))
        if (wrong := await reader.wrong_last_number()) is not None:
            _stop(difference(NUMBERS, wrong["kind"], f"last number {wrong['highest']}", wrong["last_number"]))

    def _begin(self, check: str) -> None:
        self.progress = replace(self.progress, check=check)

    def _count(self, **counts: Any) -> None:
        self.progress = replace(self.progress, **counts)

    def _found(self, found: Difference) -> None:
        self.progress = replace(self.progress, check=found.check, difference=found)


def _stop(found: Difference | None) -> None:
    if found is not None:
        raise _FoundError(found)


def _tells_of_rows(error: Exception) -> bool:
    """A value that cannot be read is damage; a database that is away, too slow or ill is not."""
    if isinstance(error, asyncpg.DataCorruptedError | asyncpg.IndexCorruptedError):
        return True
    return not (database_is_away(error) or isinstance(error, asyncpg.PostgresError | asyncpg.InterfaceError))


def _read_books(sources: Mapping[str, str]) -> dict[str, PriceBook]:
    books: dict[str, PriceBook] = {}
    for version, source in sorted(sources.items()):
        try:
            books[version] = read_book(source, f"stored price book {version}")
        except BookInvalid as error:
            _stop(difference(PRICE_BOOKS, f"price book {version}", "a price book", str(error)))
        if books[version].version != version:
            _stop(difference(PRICE_BOOKS, f"price book {version}", version, books[version].version))
    return books


def _wrong_sum(row: Any | None) -> Difference | None:
    if row is None:
        return None
    keys = ("billing_month", "project_id", "api_key_id", "usage_day", "kind", "resource", "model", "price_book_version")
    where = " ".join(str(row[key]) for key in keys if row[key] != "")
    values = ("quantity", "amount_nanos_usd", "record_count")
    wanted, found = (
        "nothing"
        if row[f"{prefix}record_count"] is None
        else ", ".join(f"{name} {row[prefix + name]}" for name in values)
        for prefix in ("", "stored_")
    )
    return difference(USAGE_SUMS, f"organizations/{row['organization_id']} {where}", wanted, found)
