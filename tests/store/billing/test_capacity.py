"""Machines by the clock on the real database: started hours of clusters, as started minutes of endpoints."""

import random
from datetime import UTC, datetime

import pytest
from google.protobuf.message import Message

from chassis.clock import ManualClock
from chassis.errors import InvalidArgument
from finemesh.events.v1 import usage_events_pb2
from tests.harness.servers import PostgresServer
from tests.store.billing.conftest import fresh_world
from tests.store.billing.world import USD, World, at, hour, minute


async def test_a_started_hour_costs_its_nodes_once(world: World) -> None:
    await world.deliver(hour("o", 0), hour("o", 0), hour("o", 1, nodes=1))
    rows = await world.pool.fetch(
        "SELECT work_key, kind, model, quantity, unit_price_nanos_usd, amount_nanos_usd, price_book_version"
        " FROM usage_records ORDER BY 1"
    )
    price = 26_880_000_000
    common = ("cluster_hours", "nvidia-h100-80gb")
    assert [tuple(row) for row in rows] == [
        ("cl_1:3:0", *common, 2, price, 2 * price, "default-2026-2"),
        ("cl_1:3:1", *common, 1, price, price, "default-2026-2"),
    ]
    assert (await world.balances("o"))["receivable"] == -3 * price
    entries = await world.pool.fetch("SELECT kind, resource FROM transactions")
    assert {tuple(row) for row in entries} == {("cluster", "projects/o-p/clusters/cl_1")}
    summed = await world.pool.fetchrow(
        "SELECT kind, sum(quantity), sum(amount_nanos_usd) FROM usage_sums GROUP BY kind"
    )
    assert summed is not None
    assert tuple(summed) == ("cluster_hours", 3, 3 * price)


IMPOSSIBLE: list[tuple[Message, str]] = [
    (hour("o", 0, nodes=0), "EVENT_INVALID"),
    (hour("o", 0, nodes=10_000), "EVENT_INVALID"),
    (hour("o", -1), "EVENT_INVALID"),
    (hour("o", 0, hardware=""), "EVENT_INVALID"),
    (hour("o", 0, cluster=""), "EVENT_INVALID"),
    (hour("o", 0, work_key=""), "EVENT_INVALID"),
    (hour("o", 0, cluster="projects/o-p/clusters/cl_2"), "EVENT_INVALID"),
    (hour("o", 0, cluster="projects/stranger/clusters/cl_1"), "EVENT_INVALID"),
    (hour("o", 0, organization_id=""), "EVENT_INVALID"),
    (hour("o", 0, usage_time=at(10_000)), "EVENT_INVALID"),
    (hour("o", 0, hardware="abacus"), "PRICE_UNKNOWN"),
]


async def test_hours_that_cannot_be_true_are_refused_for_good(world: World) -> None:
    before = await world.dump()
    for message, reason in IMPOSSIBLE:
        with pytest.raises(InvalidArgument) as refused:
            await world.deliver(message)
        assert refused.value.reason == reason, message
        assert await world.dump() == before, message


async def test_an_hour_that_is_booked_with_other_numbers_is_set_aside(world: World) -> None:
    await world.deliver(hour("o", 0))
    before = await world.dump()
    for other in (
        hour("o", 0, nodes=3),
        hour("o", 0, hardware="cpu"),
    ):
        with pytest.raises(InvalidArgument, match="other numbers"):
            await world.deliver(other)
    assert await world.dump() == before


async def test_an_hour_before_clusters_had_a_price_has_none(world: World) -> None:
    october = datetime(2026, 10, 31, 23, tzinfo=UTC)
    world.clock = ManualClock(october)
    message = hour("o", 0)
    assert isinstance(message, usage_events_pb2.ClusterHourRecorded)
    message.usage_time.FromDatetime(october)
    with pytest.raises(InvalidArgument, match="default-2026-1 has no price for cluster nodes"):
        await world.deliver(message)


async def test_hours_and_minutes_are_the_same_ledger_in_any_order(world: World, postgres: PostgresServer) -> None:
    events = [hour(name, number) for name in ("a", "b") for number in range(2)]
    events += [minute("a", number, hardware="nvidia-l40s-48gb", devices=3) for number in range(5)]
    await world.top_up("a", 5 * USD)
    await world.deliver(*events)
    shuffled = events * 2
    random.Random(5).shuffle(shuffled)
    async with fresh_world(postgres) as other:
        await other.top_up("a", 5 * USD)
        await other.deliver(*shuffled)
        assert await other.dump() == await world.dump()
