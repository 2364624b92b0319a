"""Reports of cost add up to what was charged, whatever they are summed by; pages of usage miss and repeat nothing."""

from collections.abc import Sequence
from datetime import date, datetime, timedelta
from itertools import combinations

import pytest

from chassis.db.pool import transaction
from services.billing.calendar import Month
from services.billing.config import BillingSettings
from services.billing.invoices import invoicing
from services.billing.usage.costs import CostRow, Dimension
from services.billing.usage.records import UsageKind, UsageRecord
from services.billing.usage.store import UsageStore
from services.billing.usage.usage_pages import UsageFilter
from tests.store.billing.world import LARGE, NOW, USD, World, ended, evaluate, minute, served, train, whole_run

FIRST, LAST = date(2026, 11, 1), date(2026, 11, 30)


async def costs(
    world: World,
    *dimensions: Dimension,
    organization: str = "o",
    project: str = "",
    days: tuple[date, date] = (FIRST, LAST),
) -> list[CostRow]:
    async with world.pool.acquire() as connection:
        return await UsageStore(connection).list_costs(
            organization,
            project_id=project,
            start_day=days[0],
            end_day=days[1],
            dimensions=dimensions,
            row_max=1000,
        )


async def busy(world: World) -> None:
    """A job at the minimum (5 dollars), one cut off (0.1525), one that we failed (0), calls and minutes (0.0270527)."""
    await world.top_up("o", 100 * USD)
    await world.hold("o")
    await world.deliver(*whole_run("o"), ended("o", "COMPLETED", 16))
    await world.hold("o", "ft-2", work=LARGE)
    await world.deliver(train("o", 0, 20, "ft-2"), evaluate("o", 1, "ft-2"), ended("o", "STOPPED_EARLY", 2, "ft-2"))
    await world.hold("o", "ft-3")
    await world.deliver(train("o", 0, 20, "ft-3"), ended("o", "PLATFORM_FAILURE", 1, "ft-3"))
    await world.deliver(served("o", ("gen-1", 1000, 20), ("gen-2", 500_000, 7)), minute("o", 0), minute("o", 1))
    await world.deliver(minute("stranger", 0))


SPENT = 5 * USD + 152_500_000 + 25_050_000 + 2_700 + 2_000_000


async def test_every_way_to_sum_gives_what_was_charged(world: World) -> None:
    await busy(world)
    assert (
        await world.pool.fetchval(
            "SELECT balance_nanos_usd FROM accounts WHERE organization_id = 'o' AND account = 'revenue'"
        )
        == SPENT
    )
    for count in range(len(Dimension) + 1):
        for dimensions in combinations(Dimension, count):
            rows = await costs(world, *dimensions)
            assert sum(row.amount_nanos_usd for row in rows) == SPENT, dimensions
            assert sum(row.usage_record_count for row in rows) == 16 + 2 + 1 + 4 + 2
            assert [row.keys for row in rows] == sorted({row.keys for row in rows})


async def test_a_job_costs_what_it_was_charged(world: World) -> None:
    await busy(world)
    by_resource = {row.keys[0].rpartition("/")[2]: row for row in await costs(world, Dimension.RESOURCE)}
    assert {name: row.amount_nanos_usd for name, row in by_resource.items()} == {
        "ft-1": 5 * USD,
        "ft-2": 152_500_000,
        "ft-3": 0,
        "bot": 25_052_700,
        "ep_1": 2_000_000,
    }
    assert by_resource["ft-1"].quantity == 230_000
    by_kind = {row.keys: row for row in await costs(world, Dimension.RESOURCE, Dimension.KIND)}
    job = "projects/o-p/tuningJobs/ft-1"
    assert by_kind[(job, "training_tokens")].amount_nanos_usd == 1_220_000_000
    assert by_kind[(job, "evaluation_tokens")].amount_nanos_usd == 183_000_000
    assert by_kind[(job, "job_settlement")].amount_nanos_usd == 5 * USD - 1_403_000_000
    assert by_kind[(job, "job_settlement")].quantity == 0


async def test_a_sum_over_tokens_and_minutes_has_no_quantity(world: World) -> None:
    await busy(world)
    (everything,) = await costs(world)
    assert everything == CostRow(keys=(), quantity=0, amount_nanos_usd=SPENT, usage_record_count=25)
    assert [row.quantity for row in await costs(world, Dimension.KIND)] == [
        2,
        35_000,
        501_000,
        0,
        27,
        240_000,
    ]


async def test_only_the_days_and_the_project_that_are_asked_for(world: World) -> None:
    await busy(world)
    assert await costs(world, days=(date(2026, 10, 1), date(2026, 11, 22))) == []
    assert await costs(world, days=(date(2026, 11, 24), date(2026, 12, 31))) == []
    assert await costs(world, project="other") == []
    (row,) = await costs(world, Dimension.DAY, Dimension.PROJECT, project="o-p", days=(NOW.date(), NOW.date()))
    assert row.keys == ("2026-11-23", "o-p")
    assert (await costs(world, organization="stranger"))[0].amount_nanos_usd == 1_000_000
    assert await costs(world, organization="nobody") == []


async def newest(
    world: World, wanted: UsageFilter, *, row_max: int = 7, scan_max: int = 5
) -> tuple[list[UsageRecord], int]:
    """All pages, and how many those were."""
    records: list[UsageRecord] = []
    position, pages = None, 0
    async with world.pool.acquire() as connection:
        while True:
            page = await UsageStore(connection).list_newest(wanted, after=position, row_max=row_max, scan_max=scan_max)
            records += page.records
            pages += 1
            assert len(page.records) <= row_max
            if page.next is None:
                return records, pages
            position = page.next


async def oldest(world: World, wanted: UsageFilter, scan_max: int) -> list[UsageRecord]:
    records: list[UsageRecord] = []
    position = None
    async with world.pool.acquire() as connection:
        while True:
            page = await UsageStore(connection).list_oldest(wanted, after=position, scan_max=scan_max)
            records += page.records
            if page.next is None:
                return records
            position = page.next


def keys(records: Sequence[UsageRecord]) -> list[tuple[datetime, str]]:
    return [(record.usage_time, record.work_key) for record in records]


@pytest.mark.parametrize("row_max", [1, 2, 7, 24, 25, 26, 1000])
async def test_pages_in_either_direction_have_every_record_once(world: World, row_max: int) -> None:
    await busy(world)
    wanted = UsageFilter(project_id="o-p")
    found, pages = await newest(world, wanted, row_max=row_max)
    assert len(found) == 25
    assert keys(found) == sorted(set(keys(found)), reverse=True)
    assert pages == max(1, -(-25 // row_max))
    assert await oldest(world, wanted, row_max) == found[::-1]


@pytest.mark.parametrize(
    ("filters", "count"),
    [
        ({"resource": "projects/o-p/tuningJobs/ft-2"}, 2),
        ({"kinds": (UsageKind.INPUT_TOKENS,)}, 2),
        ({"kinds": (UsageKind.INPUT_TOKENS, UsageKind.ENDPOINT_MINUTES)}, 4),
        ({"resource": "acme/bot", "kinds": (UsageKind.OUTPUT_TOKENS,)}, 2),
        ({"resource": "nothing"}, 0),
        ({"end": NOW}, 0),
        ({"start": NOW + timedelta(minutes=1), "end": NOW + timedelta(minutes=2)}, 7),
    ],
)
@pytest.mark.parametrize("scan_max", [1, 3, 1000])
async def test_filters_find_the_same_however_little_a_page_looks_at(
    world: World, filters: dict[str, object], count: int, scan_max: int
) -> None:
    await busy(world)
    wanted = UsageFilter(project_id="o-p", **filters)  # type: ignore[arg-type]
    found, _ = await newest(world, wanted, row_max=2, scan_max=scan_max)
    assert len(found) == count == len(set(keys(found)))
    assert await oldest(world, wanted, scan_max) == found[::-1]


async def test_a_month_has_its_late_records_and_not_those_of_others(world: World) -> None:
    await world.deliver(minute("o", 0))
    await world.deliver(minute("o", 1))
    world.clock.jump(20 * 86_400)
    async with transaction(world.pool) as connection:
        await invoicing.close(
            connection,
            world.outbox,
            BillingSettings().invoice_terms,
            organization_id="o",
            month=Month(year=2026, month=11),
            now=world.clock.now(),
        )
    await world.deliver(minute("o", 2))
    for month, expected in ((11, ["ep_1:7:0", "ep_1:7:1"]), (12, ["ep_1:7:2"]), (10, [])):
        wanted = UsageFilter(project_id="o-p", billing_month=date(2026, month, 1))
        async with world.pool.acquire() as connection:
            wanted = await UsageStore(connection).within_month(wanted, "o")
        assert [record.work_key for record in await oldest(world, wanted, 2)] == expected


async def test_a_month_has_the_records_of_the_jobs_on_its_invoice_whenever_they_worked(world: World) -> None:
    """A job is billed whole in the month in which it ends; one that owes nothing is on no invoice,
    nor is a running one."""
    await world.top_up("o", 100 * USD)
    for job in ("ft-1", "ft-2", "ft-3"):
        await world.hold("o", job)
    november = [train("o", 0, 20, job) for job in ("ft-1", "ft-2", "ft-3")]
    await world.deliver(*november, minute("o", 0))
    world.clock.jump(9 * 86_400)
    december = [train("o", 20, 40, job) for job in ("ft-1", "ft-2")]
    endings = [ended("o", "CANCELLED_RUNNING", 2), ended("o", "PLATFORM_FAILURE", 2, "ft-2")]
    for message in december:
        message.usage_time.FromDatetime(world.clock.now())  # type: ignore[attr-defined]
    for message in endings:
        message.end_time.FromDatetime(world.clock.now())  # type: ignore[attr-defined]
    await world.deliver(*december, *endings)
    terms = BillingSettings().invoice_terms
    for month, expected in ((11, ["ep_1:7:0"]), (12, ["ft-1:train:0-20", "ft-1:train:20-40"])):
        wanted = UsageFilter(project_id="o-p", billing_month=date(2026, month, 1))
        async with world.pool.acquire() as connection:
            invoice = await invoicing.read(connection, terms, "o", Month(year=2026, month=month))
            wanted = await UsageStore(connection).within_month(wanted, "o")
        for scan_max in (1, 2, 1000):
            found = await oldest(world, wanted, scan_max)
            assert [record.work_key for record in found] == expected
            assert {record.billing_month for record in found} == {date(2026, month, 1)}
        assert sum(line.usage_record_count for line in invoice.lines) == len(expected)
        names = {name for line in invoice.lines for name in line.usage_records}
        assert names == {f"projects/o-p/usageRecords/{record.id}" for record in found}
    listed, _ = await newest(world, UsageFilter(project_id="o-p"))
    # Of a job on no invoice it is the month of use.
    assert [
        (record.work_key, record.billing_month.month) for record in sorted(listed, key=lambda each: each.work_key)
    ] == [
        ("ep_1:7:0", 11),
        ("ft-1:train:0-20", 12),
        ("ft-1:train:20-40", 12),
        ("ft-2:train:0-20", 11),
        ("ft-2:train:20-40", 12),
        ("ft-3:train:0-20", 11),
    ]


async def test_filters_by_model_and_key(world: World) -> None:
    await busy(world)
    found, _ = await newest(world, UsageFilter(project_id="o-p", model="cpu"))
    assert len(found) == 2
    found, _ = await newest(world, UsageFilter(project_id="o-p", api_key_id="key_1"))
    assert found == []
    assert (await newest(world, UsageFilter(project_id="stranger-p", resource="acme/bot")))[0] == []
