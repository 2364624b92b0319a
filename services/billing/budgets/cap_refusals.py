"""Tells that a cap refused a call or a job. Not pure: database, bus.

Calls reserve what they may cost, so spending stops short of a cap and may never reach it. The first refusal of a month
is announced as the whole of the cap, once for each budget, whether or not somebody asked for that share.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from chassis.bus.outbox import Outbox
from chassis.clock import Clock
from chassis.db.pool import Pool, transaction
from chassis.errors import FailedPrecondition
from services.billing.budgets.caps import WHOLE_CAP_PERCENT, Spender
from services.billing.budgets.convert import budget_name, spend_threshold_to_proto
from services.billing.budgets.review import budgets_of
from services.billing.budgets.store import BudgetStore
from services.billing.calendar import Month


class CapRefusals:
    def __init__(self, pool: Pool, outbox: Outbox, *, clock: Clock) -> None:
        self._pool = pool
        self._outbox = outbox
        self._clock = clock

    @asynccontextmanager
    async def telling(self, organization_id: str, spender: Spender) -> AsyncIterator[None]:
        """Around what may be refused; the refusal goes on to the caller."""
        try:
            yield
        except FailedPrecondition as refused:
            if refused.reason == "SPEND_CAP_EXCEEDED":
                await self._tell(refused, organization_id, spender)
            raise

    async def _tell(self, refused: FailedPrecondition, organization_id: str, spender: Spender) -> None:
        """The transaction that refused has left nothing, so this is another one; the row of the alert is its lock."""
        now = self._clock.now()
        month = Month.of(now)
        told = refused.metadata
        async with transaction(self._pool) as connection:
            refusing = [
                budget
                for budget in await budgets_of(connection, organization_id, spender, now)
                # Another cap may have been set meanwhile, which refused nothing yet.
                if budget.api_key_id == told["api_key_id"]
                and str(budget.monthly_cap_nanos_usd) == told["cap_nanos_usd"]
            ]
            for budget in refusing:
                if await BudgetStore(connection).add_alerts([(budget, WHOLE_CAP_PERCENT)], month.first_day, now):
                    event = spend_threshold_to_proto(budget, WHOLE_CAP_PERCENT, month, now)
                    event.refused_nanos_usd = int(told["required_nanos_usd"])
                    await self._outbox.add(connection, event, subject_name=budget_name(budget))
        self._outbox.wake()
