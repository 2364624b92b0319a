"""Credit and caps on the real database: every change is announced once, and concurrent holds never break a cap."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pytest

from chassis.db.pool import transaction
from chassis.errors import FailedPrecondition
from finemesh.events.v1 import billing_events_pb2, usage_events_pb2
from services.billing import budget_store, spending, store
from services.billing.caps import Budget
from services.billing.invoice import Month
from tests.store.billing.world import LARGE, NOW, USD, World, at, ended, minute, served, whole_run

CREDIT = billing_events_pb2.CreditStateChanged
SHARE = billing_events_pb2.SpendThresholdReached
CAP = billing_events_pb2.SpendCapStateChanged
# A million tokens read cost 0.05 dollars.
MILLION = 10**6


async def review(world: World, organization: str) -> None:
    async with transaction(world.pool) as connection:
        await store.lock_organizations(connection, [organization])
        await spending.review(connection, world.outbox, [organization], world.clock.now())


async def top_up(world: World, organization: str, amount: int, request_id: str = "first") -> None:
    await world.top_up(organization, amount, request_id)
    await review(world, organization)


async def set_cap(
    world: World, organization: str, cap: int, key: str = "", percents: Sequence[int] = (50, 80, 100)
) -> None:
    async with transaction(world.pool) as connection:
        await store.lock_organizations(connection, [organization])
        await budget_store.set_budget(
            connection,
            organization_id=organization,
            project_id=f"{organization}-p",
            api_key_id=key,
            monthly_cap_nanos_usd=cap,
            alert_percents=percents,
            now=world.clock.now(),
        )
        await spending.review(connection, world.outbox, [organization], world.clock.now())


async def remove_cap(world: World, organization: str, key: str = "") -> None:
    async with transaction(world.pool) as connection:
        await store.lock_organizations(connection, [organization])
        await budget_store.remove_budget(connection, f"{organization}-p", key, world.clock.now())
        await spending.review(connection, world.outbox, [organization], world.clock.now())


async def budgets(world: World, organization: str) -> dict[str, Budget]:
    month = Month.of(world.clock.now()).start.date()
    async with world.pool.acquire() as connection:
        return {each.api_key_id: each for each in await budget_store.list_budgets(connection, [organization], month)}


def states(events: Sequence[CREDIT]) -> list[tuple[str, str, int]]:
    return [(event.from_state, event.to_state, event.revision) for event in events]


async def test_every_change_of_credit_is_announced_once(world: World) -> None:
    await top_up(world, "o", 10 * USD)
    await world.hold("o", "ft-1")
    await review(world, "o")
    assert states(await world.events(CREDIT)) == [("", "SUFFICIENT", 1)]
    await world.hold("o", "ft-2")
    for _ in range(2):
        await review(world, "o")
    await world.release("o", "ft-1")
    await review(world, "o")
    await world.deliver(minute("o", 0, "nvidia-h100-80gb", 100))
    assert states(await world.events(CREDIT)) == [
        ("", "SUFFICIENT", 1),
        ("SUFFICIENT", "EXHAUSTED", 2),
        ("EXHAUSTED", "SUFFICIENT", 3),
        ("SUFFICIENT", "EXHAUSTED", 4),
    ]
    last = (await world.events(CREDIT))[-1]
    assert (last.available_nanos_usd, last.owed_nanos_usd) == (0, 600_000_000)
    assert last.event_time.ToDatetime(tzinfo=UTC) == NOW


async def test_a_settlement_gives_credit_back(world: World) -> None:
    await top_up(world, "o", 5 * USD)
    await world.hold("o")
    await review(world, "o")
    await world.deliver(ended("o", "PLATFORM_FAILURE", 0))
    assert states(await world.events(CREDIT))[-2:] == [("SUFFICIENT", "EXHAUSTED", 2), ("EXHAUSTED", "SUFFICIENT", 3)]


async def test_low_credit_warns_below_its_threshold(world: World) -> None:
    await top_up(world, "o", 10 * USD)
    async with transaction(world.pool) as connection:
        await store.lock_organizations(connection, ["o"])
        await budget_store.set_low_balance(connection, "o", 6 * USD)
        assert await budget_store.get_low_balance(connection, "o") == 6 * USD
        assert await budget_store.get_low_balance(connection, "nobody") == 0
    await review(world, "o")
    await world.hold("o")
    await review(world, "o")
    await top_up(world, "o", USD, "second")
    assert states(await world.events(CREDIT)) == [
        ("", "SUFFICIENT", 1),
        ("SUFFICIENT", "LOW", 2),
        ("LOW", "SUFFICIENT", 3),
    ]


async def test_an_organization_without_entries_is_not_judged(world: World) -> None:
    async with transaction(world.pool) as connection:
        await store.lock_organizations(connection, ["o"])
        await budget_store.set_low_balance(connection, "o", USD)
    await review(world, "o")
    assert await world.events(CREDIT) == []
    # The first use that nothing covers speaks for it.
    await world.deliver(served("o", ("gen-1", MILLION, 0)))
    assert states(await world.events(CREDIT)) == [("", "EXHAUSTED", 1)]


async def test_a_storm_of_usage_exhausts_credit_once(world: World) -> None:
    await top_up(world, "o", 10 * 50_000_000)
    await asyncio.gather(*(world.deliver(served("o", (f"gen-{n}", MILLION, 0))) for n in range(20)))
    assert states(await world.events(CREDIT)) == [("", "SUFFICIENT", 1), ("SUFFICIENT", "EXHAUSTED", 2)]


async def test_shares_of_a_cap_warn_once_a_month(world: World) -> None:
    await top_up(world, "o", 100 * USD)
    await set_cap(world, "o", 500_000_000, percents=(20, 50, 100))
    await asyncio.gather(*(world.deliver(served("o", (f"gen-{n}", MILLION, 0))) for n in range(6)))
    reached = await world.events(SHARE)
    assert sorted(event.percent for event in reached) == [20, 50]
    assert {(event.project_id, event.api_key_id, event.month, event.cap_nanos_usd) for event in reached} == {
        ("o-p", "", "2026-11", 500_000_000)
    }
    assert await world.events(CAP) == []
    await asyncio.gather(*(world.deliver(served("o", (f"gen-{n}", MILLION, 0))) for n in range(6, 12)))
    assert sorted(event.percent for event in await world.events(SHARE)) == [20, 50, 100]
    (capped,) = await world.events(CAP)
    assert (capped.capped, capped.revision, capped.cap_nanos_usd) == (True, 1, 500_000_000)
    assert capped.until_time.ToDatetime(tzinfo=UTC) == datetime(2026, 12, 1, tzinfo=UTC)
    # The next month begins anew: both warnings and the cap.
    world.clock.jump(timedelta(days=10).total_seconds())
    december = served("o", ("gen-december", 4 * MILLION, 0))
    december.records[0].usage_time.FromDatetime(world.clock.now())
    await world.deliver(december)
    assert [(event.percent, event.month) for event in await world.events(SHARE)][3:] == [(20, "2026-12")]
    assert len(await world.events(CAP)) == 1
    assert not (await budgets(world, "o"))[""].capped


async def test_a_key_has_its_own_cap_beside_the_projects(world: World) -> None:
    await top_up(world, "o", 100 * USD)
    await set_cap(world, "o", 20 * USD)
    await set_cap(world, "o", 5 * USD, "key_a")
    await set_cap(world, "o", 50 * USD, "key_b")
    await world.hold("o", "ft-1", api_key_id="key_a")
    await review(world, "o")
    found = await budgets(world, "o")
    assert {key: budget.spent_nanos_usd for key, budget in found.items()} == {
        "": 5 * USD,
        "key_a": 5 * USD,
        "key_b": 0,
    }
    with pytest.raises(FailedPrecondition, match="API key key_a") as refused:
        await world.hold("o", "ft-2", api_key_id="key_a")
    assert refused.value.reason == "SPEND_CAP_EXCEEDED"
    assert refused.value.metadata == {
        "cap_nanos_usd": str(5 * USD),
        "spent_nanos_usd": str(5 * USD),
        "required_nanos_usd": str(5 * USD),
        "api_key_id": "key_a",
        "month": "2026-11",
    }
    for number in (3, 4, 5):
        await world.hold("o", f"ft-{number}", api_key_id="key_b")
    with pytest.raises(FailedPrecondition, match=r"the project has spent or holds 20\.00 of the 20\.00 USD"):
        await world.hold("o", "ft-6")
    assert await world.hold_row("o", "ft-6") is None
    (announced,) = await world.events(CAP)
    assert announced.api_key_id == "key_a"


async def test_concurrent_holds_never_break_a_cap(world: World) -> None:
    await top_up(world, "o", 1000 * USD)
    await set_cap(world, "o", 52 * USD)

    async def attempt(number: int) -> bool:
        try:
            await world.hold("o", f"ft-{number}")
        except FailedPrecondition as refused:
            assert refused.reason == "SPEND_CAP_EXCEEDED"
            return False
        return True

    outcomes = await asyncio.gather(*(attempt(number) for number in range(30)))
    assert outcomes.count(True) == 10
    assert (await budgets(world, "o"))[""].spent_nanos_usd == 50 * USD


async def test_what_is_held_counts_in_every_month_until_it_ends(world: World) -> None:
    await top_up(world, "o", 100 * USD)
    await set_cap(world, "o", 8 * USD)
    await world.hold("o", "ft-1")
    world.clock.jump(timedelta(days=10).total_seconds())
    assert (await budgets(world, "o"))[""].spent_nanos_usd == 5 * USD
    with pytest.raises(FailedPrecondition, match=r"has spent or holds 5\.00 of the 8\.00 USD") as refused:
        await world.hold("o", "ft-2")
    assert refused.value.metadata["month"] == "2026-12"
    await world.release("o", "ft-1")
    await world.hold("o", "ft-2")


async def test_what_counts_for_a_month(world: World) -> None:
    await top_up(world, "o", 100 * USD)
    await set_cap(world, "o", 100 * USD)
    await world.hold("o", "ft-1")
    await world.hold("o", "ft-2", LARGE)
    await world.hold("o", "ft-3")
    await world.release("o", "ft-3")
    # Settled at its charge of 5 dollars; its tokens do not count a second time.
    await world.deliver(*whole_run("o", "ft-1"), ended("o", "COMPLETED", 16, "ft-1"))
    await world.deliver(served("o", ("gen-1", MILLION, 0)), minute("o", 0))
    late = served("o", ("gen-october", 100 * MILLION, 0))
    late.records[0].usage_time.CopyFrom(at(-60 * 24 * 30))
    await world.deliver(late)
    cluster = usage_events_pb2.ClusterHourRecorded(
        work_key="c:1:0",
        cluster="projects/o-p/clusters/c",
        project_id="o-p",
        organization_id="o",
        hardware_type="cpu",
        node_count=1,
        usage_time=at(0),
    )
    await world.deliver(cluster)
    hours = await world.pool.fetchval("SELECT amount_nanos_usd FROM usage_records WHERE kind = 'cluster_hours'")
    expected = 5 * USD + 14_030_000_000 + 50_000_000 + 1_000_000 + hours
    assert (await budgets(world, "o"))[""].spent_nanos_usd == expected
    await world.deliver(ended("o", "CANCELLED_BEFORE_RUN", 0, "ft-2"))
    assert (await budgets(world, "o"))[""].spent_nanos_usd == expected - 14_030_000_000


async def test_a_cap_that_is_raised_removed_or_set_again_counts_its_revisions_on(world: World) -> None:
    await top_up(world, "o", 100 * USD)
    await world.hold("o")
    await set_cap(world, "o", 5 * USD)
    await set_cap(world, "o", 4 * USD)
    await set_cap(world, "o", 6 * USD)
    await set_cap(world, "o", 5 * USD)
    await remove_cap(world, "o")
    await remove_cap(world, "o")
    await set_cap(world, "o", 3 * USD)
    await world.release("o")
    await review(world, "o")
    found = [(event.capped, event.cap_nanos_usd // USD, event.revision) for event in await world.events(CAP)]
    assert found == [
        (True, 5, 1),
        (True, 4, 2),
        (False, 6, 3),
        (True, 5, 4),
        (False, 0, 5),
        (True, 3, 6),
        (False, 3, 7),
    ]
    shares = [(event.cap_nanos_usd // USD, event.percent) for event in await world.events(SHARE)]
    assert shares == [
        *((5, percent) for percent in (50, 80, 100)),
        *((4, percent) for percent in (50, 80, 100)),
        *((6, percent) for percent in (50, 80)),
        *((5, percent) for percent in (50, 80, 100)),
        *((3, percent) for percent in (50, 80, 100)),
    ]


async def test_another_cap_warns_anew_and_the_same_one_does_not(world: World) -> None:
    """Who raised a cap after its warnings wants to hear when the new one is near."""
    await top_up(world, "o", 100 * USD)
    await set_cap(world, "o", 200_000_000)
    await set_cap(world, "o", 100_000_000, "key_a", percents=(50,))
    await world.deliver(served("o", ("gen-1", 4 * MILLION, 0)))
    warned = [(event.cap_nanos_usd, event.percent) for event in await world.events(SHARE)]
    assert warned == [(200_000_000, percent) for percent in (50, 80, 100)]
    await set_cap(world, "o", 200_000_000, percents=(50, 90))
    assert [event.percent for event in await world.events(SHARE)][3:] == [90]
    # 0.20 of 1.00 dollars: nothing is near, and then all of it is, a second time.
    await set_cap(world, "o", USD)
    assert len(await world.events(SHARE)) == 4
    await world.deliver(served("o", ("gen-2", 13 * MILLION, 0)))
    await world.deliver(served("o", ("gen-3", 13 * MILLION, 0)))
    found = [(event.cap_nanos_usd, event.percent, event.api_key_id) for event in await world.events(SHARE)][4:]
    assert found == [(USD, percent, "") for percent in (50, 80, 100)]
