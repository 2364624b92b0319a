"""Leases of credit on the real database: together with holds and usage they never exceed what is there."""

import asyncio
from datetime import timedelta
from functools import partial
from typing import Any

import pytest

from chassis.clock import SystemClock
from chassis.db.pool import transaction
from chassis.errors import Aborted, FailedPrecondition
from services.billing.budgets.caps import Spender
from services.billing.budgets.store import BudgetStore
from services.billing.config import BillingSettings
from services.billing.leasing.credit_lease import CreditLease, Wish
from services.billing.leasing.granting import GrantRequest, grant
from services.billing.leasing.lease_collector import LeaseCollector
from services.billing.leasing.recall import Recall
from services.billing.leasing.store import LeaseStore, Returned
from tests.store.billing.world import NOW, SMALL, USD, World, minute, served

LIFETIME = timedelta(seconds=60)
LATE = timedelta(days=1)
# What a call of 1,000 tokens in and 500 out costs of the model that `served` names.
CALL_NANOS_USD = 1000 * 50 + 500 * 100


async def alive(world: World, *holders: str) -> None:
    async with transaction(world.pool) as connection:
        for holder in holders:
            await LeaseStore(connection).renew_holder(holder, LIFETIME)


async def lease(
    world: World,
    required: int,
    *,
    needed: int = 0,
    wanted: int = 0,
    lease_id: str = "l1",
    holder: str = "r1",
    revision: int = 1,
    key: str = "",
    organization: str = "o",
) -> CreditLease:
    request = GrantRequest(
        holder=holder,
        lease_id=lease_id,
        organization_id=organization,
        spender=Spender(f"{organization}-p", key),
        revision=revision,
        wish=Wish(required_nanos_usd=required, needed_nanos_usd=needed, wanted_nanos_usd=wanted),
    )
    async with transaction(world.pool) as connection:
        return await grant(connection, request, share=4, late_usage=LATE, now=world.clock.now())


async def give_back(world: World, granted: int, *, lease_id: str = "l1", revision: int = 2, **more: Any) -> None:
    async with transaction(world.pool) as connection:
        returned = Returned(
            lease_id=lease_id, revision=revision, granted_nanos_usd=granted, closed=more.get("closed", False)
        )
        await LeaseStore(connection).give_back(more.get("holder", "r1"), [returned])


async def leased(world: World, key: str = "") -> int:
    async with world.pool.acquire() as connection:
        return (await LeaseStore(connection).get_leased("o", Spender("o-p", key), LATE)).nanos_usd


async def cap(world: World, amount: int, key: str = "") -> None:
    async with transaction(world.pool) as connection:
        await BudgetStore(connection).set_budget(
            organization_id="o",
            project_id="o-p",
            api_key_id=key,
            monthly_cap_nanos_usd=amount,
            alert_percents=[100],
            now=NOW,
        )


def from_lease(lease_id: str, key: str) -> Any:
    event = served("o", (key, 1000, 500))
    event.records[0].credit_lease_id = lease_id
    return event


async def test_a_lease_takes_a_share_and_what_it_requires(world: World) -> None:
    await world.top_up("o", 8 * USD)
    await alive(world, "r1", "r2")
    assert (await lease(world, USD, wanted=8 * USD)).granted_nanos_usd == 2 * USD
    # The same total again is the same lease; a late request changes nothing.
    assert (await lease(world, 2 * USD, revision=2)).granted_nanos_usd == 2 * USD
    with pytest.raises(Aborted, match="LEASE_STALE"):
        await lease(world, 3 * USD, revision=2)
    assert (await lease(world, USD, wanted=8 * USD, lease_id="l2", holder="r2")).granted_nanos_usd == 6 * USD // 4
    # What calls wait for is no matter of shares.
    assert (await lease(world, 0, needed=5 * USD, lease_id="l4")).granted_nanos_usd == 4 * USD + USD // 2
    await give_back(world, 0, lease_id="l4")
    with pytest.raises(FailedPrecondition, match="BALANCE_INSUFFICIENT") as refused:
        await lease(world, 5 * USD, lease_id="l3")
    assert refused.value.metadata == {
        "required_nanos_usd": str(5 * USD),
        "available_nanos_usd": str(4 * USD + USD // 2),
        "shortfall_nanos_usd": str(USD // 2),
    }
    # Another's lease cannot be taken over, and a holder that nobody knows gets none.
    for lease_id, holder in (("l1", "r2"), ("l9", "r9")):
        with pytest.raises(Aborted, match="LEASE_STALE"):
            await lease(world, 1, revision=9, lease_id=lease_id, holder=holder)


async def test_leases_and_holds_cannot_spend_the_same_money(world: World) -> None:
    await world.top_up("o", 6 * USD)
    await alive(world, "r1")
    await lease(world, 2 * USD)
    # The job needs 5.00 USD.
    with pytest.raises(FailedPrecondition, match="BALANCE_INSUFFICIENT"):
        await world.hold("o", work=SMALL)
    await give_back(world, USD)
    await world.hold("o", work=SMALL)
    with pytest.raises(FailedPrecondition, match="BALANCE_INSUFFICIENT"):
        await lease(world, USD + 1, revision=3)


async def test_who_lacks_more_than_leases_hold_is_told_what_to_add(world: World) -> None:
    await world.top_up("o", 4 * USD)
    await alive(world, "r1")
    await lease(world, USD)
    # The job needs 5.00 USD. The leased dollar comes back by itself, so one more is enough.
    with pytest.raises(FailedPrecondition, match="BALANCE_INSUFFICIENT") as lacking_credit:
        await world.hold("o", work=SMALL)
    assert lacking_credit.value.metadata["shortfall_nanos_usd"] == str(USD)
    await world.top_up("o", 4 * USD, request_id="more")
    await cap(world, 3 * USD)
    with pytest.raises(FailedPrecondition, match="SPEND_CAP_EXCEEDED") as lacking_room:
        await world.hold("o", work=SMALL)
    assert lacking_room.value.metadata["shortfall_nanos_usd"] == str(2 * USD)


async def test_concurrent_grants_and_holds_never_exceed_credit_or_a_cap(world: World) -> None:
    await world.top_up("o", 20 * USD)
    await cap(world, 12 * USD)
    await cap(world, 2 * USD, key="k0")
    replicas = [f"r{number}" for number in range(4)]
    await alive(world, *replicas)
    wishes = [
        partial(lease, world, USD, wanted=4 * USD, lease_id=f"{holder}-k{key}", holder=holder, key=f"k{key}")
        for key in range(4)
        for holder in replicas
    ]
    results = await asyncio.gather(*(wish() for wish in wishes), world.hold("o"), return_exceptions=True)
    assert all(isinstance(each, FailedPrecondition) for each in results if isinstance(each, BaseException)), results
    held = (await world.balances("o"))["held"]
    assert await leased(world) + held <= 12 * USD
    assert (
        await world.pool.fetchval("SELECT sum(granted_nanos_usd) FROM credit_leases WHERE api_key_id='k0'") <= 2 * USD
    )
    with pytest.raises(FailedPrecondition, match="SPEND_CAP_EXCEEDED") as refused:
        await lease(world, 2 * USD + 1, lease_id="more", holder="r1", key="k0")
    # Both caps may have too little room by now; the refusal names one of them.
    assert refused.value.metadata["api_key_id"] in ("k0", "")
    assert int(refused.value.metadata["shortfall_nanos_usd"]) >= 1


async def test_booked_usage_lowers_the_lease_that_it_came_from_once(world: World) -> None:
    await world.top_up("o", USD)
    await alive(world, "r1")
    await lease(world, 3 * CALL_NANOS_USD)
    event = from_lease("l1", "gen-1")
    for _ in range(2):
        await world.deliver(event)
    assert await leased(world) == 2 * CALL_NANOS_USD
    # What is left for others is the same as before: it moved from the lease to the ledger.
    with pytest.raises(FailedPrecondition) as refused:
        await lease(world, USD, lease_id="l2")
    assert refused.value.metadata["available_nanos_usd"] == str(USD - 3 * CALL_NANOS_USD)
    # Closed, it waits for its last call; an unknown lease changes nothing.
    await give_back(world, 2 * CALL_NANOS_USD, closed=True)
    assert await leased(world) == CALL_NANOS_USD
    await world.deliver(from_lease("l1", "gen-2"), from_lease("nobody", "gen-3"))
    assert await leased(world) == 0
    assert await world.pool.fetchval("SELECT count(*) FROM credit_leases") == 0


async def test_late_and_foreign_returns_change_nothing(world: World) -> None:
    await world.top_up("o", USD)
    await alive(world, "r1")
    await lease(world, 100, revision=5)
    await give_back(world, 10, revision=5)
    await give_back(world, 10, revision=6, holder="r2")
    assert await leased(world) == 100
    await give_back(world, 40, revision=6)
    # A lease never grows by a return.
    await give_back(world, 90, revision=7)
    assert await leased(world) == 40


async def test_a_holder_that_is_gone_takes_nothing_away(world: World) -> None:
    await world.top_up("o", USD)
    await alive(world, "r1", "r2")
    await lease(world, 300)
    await lease(world, 200, lease_id="l2", holder="r2")
    await lease(world, 100, lease_id="l3", holder="r2")
    await give_back(world, 70, lease_id="l3", holder="r2", closed=True)
    collector = LeaseCollector(world.pool, BillingSettings(), clock=world.clock)
    await collector.collect()
    assert await leased(world) == 570
    await world.pool.execute("UPDATE lease_holders SET expire_time = now() - interval '1 s' WHERE holder = 'r2'")
    # The closed lease waits for its usage without its holder.
    assert await leased(world) == 370
    with pytest.raises(Aborted, match="LEASE_STALE"):
        await lease(world, 201, lease_id="l2", holder="r2", revision=2)
    # Others may have what it held, so it cannot come back, also when another billing starts.
    async with transaction(world.pool) as connection:
        assert not await LeaseStore(connection).renew_holder("r2", LIFETIME)
        assert await LeaseStore(connection).renew_holder("r1", timedelta(seconds=BillingSettings().credit_lease_s))
    await collector.begin()
    assert await leased(world) == 370
    # When billing itself was away nobody renewed, and nobody took anything.
    await world.pool.execute("UPDATE lease_holders SET expire_time = now() - interval '1 s'")
    assert await leased(world) == 70
    await collector.begin()
    assert await leased(world) == 570
    await world.pool.execute("UPDATE lease_holders SET expire_time = now() - interval '1 s' WHERE holder = 'r2'")
    await world.pool.execute("UPDATE credit_leases SET closed_time = now() - interval '2 days' WHERE lease_id = 'l3'")
    await collector.collect()
    assert [row["lease_id"] for row in await world.pool.fetch("SELECT lease_id FROM credit_leases")] == ["l1"]
    async with transaction(world.pool) as connection:
        assert not await LeaseStore(connection).renew_holder("r2", LIFETIME)
        assert await LeaseStore(connection).renew_holder("r1", LIFETIME)


async def test_idle_leases_are_recalled_for_whoever_needs_them(world: World) -> None:
    await world.top_up("o", 6 * USD)
    await alive(world, "r1")
    await lease(world, 2 * USD)

    async def answers() -> None:
        """As a replica does at its next renewal: one dollar is reserved by calls."""
        while True:
            async with world.pool.acquire() as connection:
                if await LeaseStore(connection).list_recalled("r1", 10) == ["l1"]:
                    break
            await asyncio.sleep(0.01)
        await give_back(world, USD)

    settings = BillingSettings(credit_recall_s_max=60, credit_recall_poll_s=0.01)
    recall = Recall(world.pool, settings, clock=SystemClock())
    answering = asyncio.create_task(answers())
    held = await recall.retrying(lambda: world.hold("o", work=SMALL), organization_id="o")
    await answering
    assert held.held_nanos_usd == 5 * USD
    # What is left is reserved: nothing would help, so nobody waits.
    with pytest.raises(FailedPrecondition, match="BALANCE_INSUFFICIENT"):
        await recall.retrying(lambda: world.hold("o", "ft-2", SMALL), organization_id="o")
    assert await world.pool.fetchval("SELECT count(*) FROM credit_leases WHERE recalled") == 0


async def test_minutes_that_use_up_leased_credit_call_it_back(world: World) -> None:
    minute_nanos_usd = 1_000_000
    await world.top_up("o", 3 * minute_nanos_usd)
    await alive(world, "r1")
    await lease(world, minute_nanos_usd)
    recalled = "SELECT count(*) FROM credit_leases WHERE recalled"
    await world.deliver(minute("o", 0), minute("o", 1))
    assert await world.pool.fetchval(recalled) == 0
    await world.deliver(minute("o", 2))
    assert await world.pool.fetchval(recalled) == 1


@pytest.mark.parametrize("key", ["", "k0"])
async def test_minutes_that_use_up_a_cap_behind_leases_call_the_projects_back(world: World, key: str) -> None:
    minute_nanos_usd = 1_000_000
    await world.top_up("o", 100 * USD)
    await cap(world, 3 * minute_nanos_usd)
    await alive(world, "r1")
    await lease(world, minute_nanos_usd, key=key)
    # Of another project, whose room is not touched.
    await world.pool.execute(
        "INSERT INTO credit_leases"
        " (lease_id, holder, organization_id, project_id, api_key_id, granted_nanos_usd, revision)"
        " VALUES ('l2', 'r1', 'o', 'o-q', '', $1, 1)",
        USD,
    )
    recalled = "SELECT coalesce(string_agg(lease_id, ','), '') FROM credit_leases WHERE recalled"
    await world.deliver(minute("o", 0), minute("o", 1))
    assert await world.pool.fetchval(recalled) == ""
    await world.deliver(minute("o", 2))
    assert await world.pool.fetchval(recalled) == "l1"
