"""Gets back credit that is leased and not used, when somebody else needs it. Not pure: database.

Leases are small, but with little credit left, or many replicas and keys, what nobody uses right now can be what a job
or a call lacks. Holders hear of a recall when they renew, within about a second.
"""

from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import TypeVar

from chassis.clock import Clock
from chassis.db.pool import Connection, Pool, transaction
from chassis.errors import FailedPrecondition
from services.billing.budgets.caps import Spender, room_under
from services.billing.budgets.review import budgets_of
from services.billing.config import BillingSettings
from services.billing.leasing.store import LeaseStore
from services.billing.ledger.entries import Balances

REFUSALS = ("BALANCE_INSUFFICIENT", "SPEND_CAP_EXCEEDED")
SHORTFALL = "shortfall_nanos_usd"
T = TypeVar("T")


class Recall:
    """Tries again once idle leases are back."""

    def __init__(self, pool: Pool, settings: BillingSettings, *, clock: Clock) -> None:
        self._pool = pool
        self._wait_s_max = settings.credit_recall_s_max
        self._poll_s = settings.credit_recall_poll_s
        self._clock = clock

    async def retrying(
        self, attempt: Callable[[], Awaitable[T]], *, organization_id: str, asking_lease_id: str = ""
    ) -> T:
        """What `attempt` returns. After a refusal that idle leases could lift it is made again, once."""
        try:
            return await attempt()
        except FailedPrecondition as refused:
            if not await self._recalled(refused, organization_id, asking_lease_id):
                raise
        return await attempt()

    async def _recalled(self, refused: FailedPrecondition, organization_id: str, asking_lease_id: str) -> bool:
        """False when nothing that is leased would help."""
        shortfall_nanos_usd = int(refused.metadata.get(SHORTFALL, "0"))
        if refused.reason not in REFUSALS or shortfall_nanos_usd <= 0:
            return False
        async with transaction(self._pool) as connection:
            leases = LeaseStore(connection)
            if await leases.get_recallable(organization_id, asking_lease_id) < shortfall_nanos_usd:
                return False
            await leases.recall(organization_id, asking_lease_id)
        until_s = self._clock.monotonic() + self._wait_s_max
        while self._clock.monotonic() < until_s:
            await self._clock.sleep(self._poll_s)
            async with self._pool.acquire() as connection:
                if not await LeaseStore(connection).has_recalled(organization_id, asking_lease_id):
                    break
        return True


async def recall_uncovered(
    connection: Connection, organization_id: str, project_id: str, balances: Balances, now: datetime
) -> None:
    """Asks for idle leases back when devices used up what is behind them, which nobody reserved before: the credit of
    the organization, or the cap of the project.

    The organization is locked, and `balances` are those after the entry.
    """
    leases = LeaseStore(connection)
    leased_nanos_usd = await leases.get_recallable(organization_id)
    if leased_nanos_usd > balances.available_nanos_usd:
        await leases.recall(organization_id)
    elif leased_nanos_usd:
        project = Spender(project_id)
        leased = {project: await leases.get_recallable(organization_id, project_id=project_id)}
        tightest = room_under(await budgets_of(connection, organization_id, project, now), leased)
        if tightest is not None and tightest[1] < 0 < leased[project]:
            await leases.recall(organization_id, project_id=project_id)
