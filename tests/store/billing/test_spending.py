"""Credit and caps on the real database: every change is announced once, and concurrent holds never break a cap."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from chassis.db.pool import Connection, transaction
from chassis.db.queries import statements
from chassis.errors import FailedPrecondition
from finemesh.events.v1 import billing_events_pb2, usage_events_pb2
from services.billing.budgets.caps import Budget, Spender
from services.billing.budgets.review import review_spending
from services.billing.budgets.store import BudgetStore
from services.billing.calendar import Month
from services.billing.holds.expiry import Word
from services.billing.ledger.store import LedgerStore
from tests.store.billing.world import LARGE, NOW, USD, World, at, ended, minute, resource, served, whole_run

CREDIT = billing_events_pb2.CreditStateChanged
SHARE = billing_events_pb2.SpendThresholdReached
CAP = billing_events_pb2.SpendCapStateChanged
ROOT = Path(__file__).parents[3]
# A million tokens read cost 0.05 dollars.
MILLION = 10**6


async def review(world: World, organization: str, key: str = "") -> None:
    async with transaction(world.pool) as connection:
        await LedgerStore(connection).lock([organization])
        await review_on(connection, world, organization, key)


async def review_on(connection: Connection, world: World, organization: str, key: str) -> None:
    spenders = [Spender(f"{organization}-p", key)]
    await review_spending(connection, world.outbox, [organization], world.clock.now(), spenders=spenders)


async def top_up(world: World, organization: str, amount: int, request_id: str = "first") -> None:
    await world.top_up(organization, amount, request_id)
    await review(world, organization)


async def set_cap(
    world: World, organization: str, cap: int, key: str = "", percents: Sequence[int] = (50, 80, 100)
) -> None:
    async with transaction(world.pool) as connection:
        await LedgerStore(connection).lock([organization])
        await BudgetStore(connection).set_budget(
            organization_id=organization,
            project_id=f"{organization}-p",
            api_key_id=key,
            monthly_cap_nanos_usd=cap,
            alert_percents=percents,
            now=world.clock.now(),
        )
        await review_on(connection, world, organization, key)


async def remove_cap(world: World, organization: str, key: str = "") -> None:
    async with transaction(world.pool) as connection:
        await LedgerStore(connection).lock([organization])
        await BudgetStore(connection).remove_budget(f"{organization}-p", key, world.clock.now())
        await review_on(connection, world, organization, key)


async def budgets(world: World, organization: str) -> dict[str, Budget]:
    month = Month.of(world.clock.now()).start.date()
    project = f"{organization}-p"
    async with world.pool.acquire() as connection:
        keys = await BudgetStore(connection).list_budget_keys(organization, project)
        spenders = [Spender(project, key) for key in keys]
        found = await BudgetStore(connection).list_budgets([organization], spenders, month)
    return {each.api_key_id: each for each in found}


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
        await LedgerStore(connection).lock(["o"])
        await BudgetStore(connection).set_low_balance("o", 6 * USD)
        assert await BudgetStore(connection).get_low_balance("o") == 6 * USD
        assert await BudgetStore(connection).get_low_balance("nobody") == 0
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
        await LedgerStore(connection).lock(["o"])
        await BudgetStore(connection).set_low_balance("o", USD)
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
    await review(world, "o", "key_a")
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
        "available_nanos_usd": "0",
        "shortfall_nanos_usd": str(5 * USD),
        "api_key_id": "key_a",
        "month": "2026-11",
        "until_time": "2026-12-01T00:00:00+00:00",
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


async def test_a_jobs_end_frees_the_cap_of_its_key(world: World) -> None:
    """However it ends: settled by its events, or by a scheduler that does not know it."""
    await top_up(world, "o", 100 * USD)
    await set_cap(world, "o", 5 * USD, "key_a")
    for job in ("ft-1", "ft-2"):
        await world.hold("o", job, api_key_id="key_a")
        await review(world, "o", "key_a")
        if job == "ft-1":
            await world.deliver(ended("o", "PLATFORM_FAILURE", 0, job))
        else:
            await world.pass_time(timedelta(days=2))
            assert await world.expiry().end({resource("o", job): Word.UNKNOWN}) == []
    changes = [(event.api_key_id, event.capped, event.revision) for event in await world.events(CAP)]
    assert changes == [("key_a", True, 1), ("key_a", False, 2), ("key_a", True, 3), ("key_a", False, 4)]


async def test_a_removed_budget_of_which_no_cap_was_announced_leaves_nothing(world: World) -> None:
    await top_up(world, "o", 100 * USD)
    await world.deliver(served("o", ("gen-1", MILLION, 0)))
    for number in range(20):
        await set_cap(world, "o", USD, f"key_{number}")
        await remove_cap(world, "o", f"key_{number}")
    # Half of the first is spent, which warns and caps nothing; the second is reached.
    for cap in (100_000_000, 50_000_000):
        assert await world.pool.fetchval("SELECT count(*) FROM budgets") == 0
        await set_cap(world, "o", cap)
        assert await world.pool.fetchval("SELECT count(*) FROM budget_alerts") > 0
        await remove_cap(world, "o")
        assert await world.pool.fetchval("SELECT count(*) FROM budget_alerts") == 0
    assert await world.pool.fetchval("SELECT revision FROM budgets") == 2
    assert await budgets(world, "o") == {}


async def test_a_message_reviews_the_budgets_of_its_own_key_and_project(world: World) -> None:
    await top_up(world, "o", 100 * USD)
    for key in ("", "key_a", "key_b"):
        await set_cap(world, "o", USD, key)

    async def use(name: str, key: str) -> set[str]:
        message = served("o", (name, MILLION, 0))
        message.records[0].api_key_id = key
        await world.deliver(message)
        return {event.api_key_id for event in await world.events(CAP)}

    for key in ("key_a", "key_b"):
        assert await use(f"gen-{key}", key) == set()
    # As if the caps had been reached unnoticed: only a budget that is looked at is announced now.
    await world.pool.execute("UPDATE budgets SET monthly_cap_nanos_usd = 1")
    assert await use("gen-1", "key_b") == {"", "key_b"}
    assert await use("gen-2", "key_a") == {"", "key_a", "key_b"}


async def test_a_budget_reads_no_row_that_it_does_not_count(world: World) -> None:
    """Under the lock of an organization: a thousand other keys with budgets and usage cost nothing."""
    keys = 1000
    await top_up(world, "o", 100 * USD)
    message = served("o", *((f"gen-{number}", MILLION, 0) for number in range(1, keys + 1)))
    for number, record in enumerate(message.records, 1):
        record.api_key_id = f"key_{number}"
    await world.deliver(message, served("o", ("gen-nobody", MILLION, 0)))
    await world.pool.execute(
        "INSERT INTO budgets"
        " (project_id, api_key_id, organization_id, monthly_cap_nanos_usd, alert_percents, update_time)"
        " SELECT 'o-p', 'key_' || n, 'o', $2, '{50}', now() FROM generate_series(1, $1::int) AS n",
        keys,
        USD,
    )
    await world.pool.execute("ANALYZE budgets, usage_sums")
    assert await rows_read(world, [Spender("o-p", "key_7")]) <= 10
    # With the budget of the project its own month is summed, once.
    await set_cap(world, "o", USD)
    assert await rows_read(world, [Spender("o-p", "key_7"), Spender("o-p")]) <= keys + 10
    everybody = [Spender("o-p", f"key_{number}") for number in range(1, keys + 1)]
    assert await rows_read(world, [Spender("o-p"), *everybody]) <= 10 * keys
    async with world.pool.acquire() as connection:
        month = Month.of(NOW).start.date()
        found = await BudgetStore(connection).list_budgets(["o"], [Spender("o-p"), *everybody], month)
    assert [budget.spent_nanos_usd for budget in found] == [(keys + 1) * 50_000_000] + keys * [50_000_000]


async def rows_read(world: World, spenders: Sequence[Spender]) -> int:
    """Rows that the query of these budgets reads, in tables and in what it keeps for itself."""
    sql = statements(ROOT / "services/billing/budgets/queries.sql")["list_budgets"]
    projects, keys = [spender.project_id for spender in spenders], [spender.api_key_id for spender in spenders]
    month = Month.of(NOW).start.date()
    plan = await world.pool.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON) {sql}", ["o"], projects, keys, month)
    return _scanned(plan[0]["Plan"])


def _scanned(node: dict[str, Any]) -> int:
    below = sum(_scanned(child) for child in node.get("Plans", ()))
    if not node["Node Type"].endswith("Scan") or node["Node Type"] in ("Subquery Scan", "Function Scan"):
        return below
    return below + round((node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"])
