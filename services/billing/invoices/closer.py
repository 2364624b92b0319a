"""Closes the invoices of months that are over and past their time of grace. Not pure: database, bus.

It decides only when. Any number of processes may do it at once, because closing is done once under the organization's
lock.
"""

from datetime import date, timedelta

import structlog

from chassis.backoff import Backoff
from chassis.bus.outbox import Outbox
from chassis.clock import Clock
from chassis.db.pool import Pool, database_is_away
from chassis.rounds import run_rounds
from services.billing.calendar import Month
from services.billing.config import BillingSettings
from services.billing.invoices import invoicing
from services.billing.invoices.store import InvoiceStore

_log = structlog.get_logger(__name__)
_FIRST = ("", date(1970, 1, 1))


class Closer:
    """One transaction for each invoice, so that nobody waits for the invoices of others."""

    def __init__(self, pool: Pool, outbox: Outbox, settings: BillingSettings, *, clock: Clock) -> None:
        self._pool = pool
        self._outbox = outbox
        self._settings = settings
        self._clock = clock

    async def run(self) -> None:
        interval_s = self._settings.invoice_close_interval_s
        await run_rounds(
            "invoice_closer",
            self._close_all_due,
            wait=lambda: self._clock.sleep(interval_s),
            clock=self._clock,
            backoff=Backoff(first_s=interval_s, last_s=interval_s),
        )

    async def _close_all_due(self) -> bool:
        await self.close_due()
        # Whatever is left is not due yet, or cannot be closed: it is looked at again after the pause.
        return False

    async def close_due(self) -> int:
        """Closes all that is due and returns how many invoices that were; one that cannot be closed stops no other."""
        before = Month.of(self._clock.now() - timedelta(seconds=self._settings.invoice_grace_s)).first_day
        seen, count = _FIRST, 0
        while True:
            async with self._pool.acquire() as connection:
                due = await InvoiceStore(connection).list_due(
                    before=before, after=seen, row_max=self._settings.invoice_close_batch_max
                )
            for organization_id, day in due:
                count += await self._close(organization_id, Month.from_day(day))
                seen = (organization_id, day)
            if len(due) < self._settings.invoice_close_batch_max:
                return count

    async def _close(self, organization_id: str, month: Month) -> bool:
        try:
            terms, now = self._settings.invoice_terms, self._clock.now()
            closed = await invoicing.close_at_once(
                self._pool, self._outbox, terms, organization_id=organization_id, month=month, now=now
            )
        except Exception as error:
            if database_is_away(error):
                raise
            # Whatever is wrong with one invoice, a crash here would keep all others from being closed.
            _log.error("invoice_not_closed", organization_id=organization_id, month=str(month), error=repr(error))
            return False
        _log.info("invoice_closed", organization_id=organization_id, month=str(month), number=closed.number)
        return True
