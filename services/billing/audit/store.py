"""Reads what an audit recomputes: whole tables in sorted streams, some rows at a time. It checks nothing.

All of it is read inside the caller's transaction.
"""

from collections.abc import AsyncIterator, Callable
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

from chassis.db.pool import Connection
from chassis.db.queries import load_queries
from services.billing.audit.chain_audit import Head
from services.billing.audit.document_audit import CreditNoteRow, InvoiceRow
from services.billing.audit.hold_audit import HoldRow, JobEntryRow
from services.billing.audit.usage_audit import ServedRow, UsageRow
from services.billing.ledger.chain import EntryRow

_queries = load_queries(Path(__file__).parent / "queries.sql")
_R = TypeVar("_R")
_EVERY = ""
_INVOICES_AT_A_TIME = 4


class AuditStore:
    """Reads of one organization, or of all when its id is None, at most `batch_rows` rows of a stream at a time.

    Each statement may take `timeout_s`: the database sorts a large table before it answers the first row.
    """

    def __init__(
        self, connection: Connection, organization_id: str | None, *, batch_rows: int, timeout_s: float
    ) -> None:
        self._connection = connection
        self._scope = {"organization_id": organization_id or _EVERY}
        self._batch_rows = batch_rows
        self._timeout_s = timeout_s

    async def begin(self) -> None:
        """Once, at the beginning of the transaction."""
        await _queries.allow_long_statements(self._connection, timeout_ms=str(int(self._timeout_s * 1000)))

    async def heads(self) -> dict[str, Head]:
        """By organization."""
        rows = _queries.list_heads(self._connection, **self._scope)
        return {
            row["organization_id"]: Head(row["position"], row["hash"], row["posted_position"]) async for row in rows
        }

    async def balances(self) -> dict[str, dict[str, int]]:
        """Organization -> account -> nano-dollars."""
        found: dict[str, dict[str, int]] = {}
        async for row in _queries.list_accounts(self._connection, **self._scope):
            found.setdefault(row["organization_id"], {})[row["account"]] = row["balance_nanos_usd"]
        return found

    async def closed_months(self) -> dict[str, set[date]]:
        """Organization -> first days of the months whose invoices are closed."""
        found: dict[str, set[date]] = {}
        async for row in _queries.list_months_closed(self._connection, **self._scope):
            found.setdefault(row["organization_id"], set()).add(row["billing_month"])
        return found

    def entries(self) -> AsyncIterator[EntryRow]:
        """In the order of the chains."""
        return self._stream("stream_entries", EntryRow._make)

    def holds(self) -> AsyncIterator[HoldRow]:
        """By job."""
        return self._stream("stream_holds", HoldRow._make)

    def job_usage(self) -> AsyncIterator[UsageRow]:
        """By job."""
        return self._stream("stream_job_usage", UsageRow._make)

    def job_entries(self) -> AsyncIterator[JobEntryRow]:
        """By job."""
        return self._stream("stream_job_entries", JobEntryRow._make)

    def served_usage(self) -> AsyncIterator[UsageRow]:
        """By the id of the entry; first what names none."""
        return self._stream("stream_served_usage", UsageRow._make)

    def served_entries(self) -> AsyncIterator[ServedRow]:
        """By id."""
        return self._stream("stream_served_entries", ServedRow._make)

    async def wrong_sum(self) -> Any | None:
        """The first of the stored sums of usage that is not the sum of its records, with both."""
        statement = await self._connection.prepare(_queries.get_wrong_sum.sql)
        return await statement.fetchrow(*self._scope.values(), timeout=self._timeout_s)

    def invoices(self) -> AsyncIterator[InvoiceRow]:
        """By organization and month; a few at a time, because their content is large."""
        return self._stream("stream_invoices", InvoiceRow._make, batch_rows=_INVOICES_AT_A_TIME)

    def line_records(
        self, organization_id: str, month: date, project_id: str, resource: str, usage_kind: str
    ) -> AsyncIterator[str]:
        """Work keys behind a line of an invoice."""
        values = {
            "organization_id": organization_id,
            "project_id": project_id,
            "resource": resource,
            "usage_kind": usage_kind,
            "billing_month": month,
        }
        return self._stream("stream_line_records", lambda row: row["work_key"], values=tuple(values.values()))

    def credit_notes(self) -> AsyncIterator[CreditNoteRow]:
        """By organization and number."""
        return self._stream("stream_credit_notes", CreditNoteRow._make)

    async def wrong_number(self) -> Any | None:
        """The first document whose number does not follow on the one before; of all organizations together."""
        return await _queries.get_wrong_number(self._connection)

    async def wrong_last_number(self) -> Any | None:
        """The first counter of numbers that is not at the highest."""
        return await _queries.get_wrong_last_number(self._connection)

    async def _stream(
        self,
        name: str,
        make: Callable[[Any], _R],
        *,
        values: tuple[Any, ...] | None = None,
        batch_rows: int | None = None,
    ) -> AsyncIterator[_R]:
        """A server-side cursor: neither this process nor the driver ever holds more than a batch."""
        statement = await self._connection.prepare(getattr(_queries, name).sql)
        cursor = await statement.cursor(*(values or self._scope.values()), timeout=self._timeout_s)
        while rows := await cursor.fetch(batch_rows or self._batch_rows, timeout=self._timeout_s):
            for row in rows:
                yield make(row)
