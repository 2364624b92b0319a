"""Leases of credit and their holders in the database. It decides nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from chassis.db.pool import Connection
from chassis.db.queries import affected, load_queries
from services.billing.budgets.caps import Spender
from services.billing.leasing.credit_lease import CreditLease, Leased

_queries = load_queries(Path(__file__).parent / "queries.sql")


@dataclass(frozen=True, kw_only=True)
class Returned:
    """The total that a lease comes to now, and whether it is closed."""

    lease_id: str
    revision: int
    granted_nanos_usd: int
    closed: bool


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What was booked of calls that were reserved from a lease."""

    lease_id: str
    organization_id: str
    amount_nanos_usd: int


class LeaseStore:
    """Time is the database's. Sums are exact under the lock of the organization's chain."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def renew_holder(self, holder: str, lifetime: timedelta) -> bool:
        """False when the holder was not known, and is then, or its leases are over, and stay so."""
        lifetime_s = lifetime.total_seconds()
        if affected(await _queries.renew_holder(self._connection, holder=holder, lifetime_s=lifetime_s)):
            return True
        await _queries.insert_holder(self._connection, holder=holder, lifetime_s=lifetime_s)
        return False

    async def renew_all_holders(self, lifetime: timedelta, quiet: timedelta) -> None:
        """Unless one of them renewed within `quiet`."""
        await _queries.renew_all_holders(
            self._connection, lifetime_s=lifetime.total_seconds(), quiet_s=quiet.total_seconds()
        )

    async def delete_holder(self, holder: str) -> None:
        await _queries.delete_holder(self._connection, holder=holder)

    async def delete_expired_holders(self) -> list[str]:
        return [row["holder"] async for row in _queries.delete_expired_holders(self._connection)]

    async def delete_orphans(self, late: timedelta) -> int:
        """Leases without a holder, and closed ones whose usage is later than `late`; says how many there were."""
        return affected(await _queries.delete_orphans(self._connection, late_s=late.total_seconds()))

    async def is_alive(self, holder: str) -> bool:
        return bool(await _queries.is_alive(self._connection, holder=holder))

    async def lock_lease(self, lease_id: str) -> CreditLease | None:
        row = await _queries.lock_lease(self._connection, lease_id=lease_id)
        return CreditLease(**row) if row is not None else None

    async def save(self, lease: CreditLease) -> None:
        await _queries.save_lease(
            self._connection,
            lease_id=lease.lease_id,
            holder=lease.holder,
            organization_id=lease.organization_id,
            project_id=lease.project_id,
            api_key_id=lease.api_key_id,
            granted_nanos_usd=lease.granted_nanos_usd,
            revision=lease.revision,
        )

    async def get_leased(self, organization_id: str, spender: Spender, late: timedelta) -> Leased:
        row = await _queries.get_leased(
            self._connection, organization_id=organization_id, late_s=late.total_seconds(), **spender._asdict()
        )
        by_spender = {spender: row["api_key_nanos_usd"], Spender(spender.project_id): row["project_nanos_usd"]}
        return Leased(nanos_usd=row["organization_nanos_usd"], by_spender=by_spender)

    async def give_back(self, holder: str, returns: Sequence[Returned]) -> None:
        """Lowers leases of the holder; one of which everything is booked is forgotten."""
        if not returns:
            return
        await _queries.return_credit(
            self._connection,
            holder=holder,
            lease_ids=[each.lease_id for each in returns],
            revisions=[each.revision for each in returns],
            granted=[each.granted_nanos_usd for each in returns],
            closed=[each.closed for each in returns],
        )
        await self._forget_drained([each.lease_id for each in returns if each.closed])

    async def draw(self, drawn: Sequence[Drawn]) -> None:
        """Lowers leases by usage that is booked in the same transaction. A lease that is over is not there any more."""
        if not drawn:
            return
        rows = _queries.draw_credit(
            self._connection,
            lease_ids=[each.lease_id for each in drawn],
            organization_ids=[each.organization_id for each in drawn],
            amounts=[each.amount_nanos_usd for each in drawn],
        )
        await self._forget_drained([row["lease_id"] async for row in rows])

    async def recall(self, organization_id: str, lease_id: str = "", *, project_id: str = "") -> None:
        """Asks for what the leases but this one do not use: the organization's, or those of one project."""
        await _queries.recall(
            self._connection, organization_id=organization_id, project_id=project_id, lease_id=lease_id
        )

    async def get_recallable(self, organization_id: str, lease_id: str = "", *, project_id: str = "") -> int:
        """At most what such a recall can bring, in nano-dollars."""
        nanos_usd = await _queries.get_recallable(
            self._connection, organization_id=organization_id, project_id=project_id, lease_id=lease_id
        )
        return int(nanos_usd)

    async def has_recalled(self, organization_id: str, lease_id: str) -> bool:
        return bool(await _queries.has_recalled(self._connection, organization_id=organization_id, lease_id=lease_id))

    async def list_recalled(self, holder: str, row_max: int) -> list[str]:
        rows = _queries.list_recalled(self._connection, holder=holder, row_max=row_max)
        return [row["lease_id"] async for row in rows]

    async def _forget_drained(self, lease_ids: Sequence[str]) -> None:
        if lease_ids:
            await _queries.delete_drained(self._connection, lease_ids=list(lease_ids))
