"""Holds end by the scheduler's word and never by time alone: late usage is booked and charged in full."""

import asyncio
import uuid
from datetime import timedelta
from typing import Any

import pytest
from google.protobuf.message import Message

from chassis.bus.dead_letters import discard, list_dead_letters, set_aside
from chassis.bus.envelope import EventInfo
from chassis.clock import ManualClock
from chassis.db.pool import transaction
from chassis.errors import FailedPrecondition, InvalidArgument
from chassis.rounds import AbsenceGuard
from finemesh.events.v1 import billing_events_pb2
from services.billing.config import BillingSettings
from services.billing.events import DURABLE
from services.billing.holds.expiry import OverdueWatch, Word
from services.billing.holds.store import HoldStore
from services.billing.ledger.store import LedgerStore
from services.billing.usage.store import UsageStore
from tests.harness.parties import others_transaction
from tests.store.billing.world import NOW, USD, World, ended, resource, train, waiting, whole_run

TTL = timedelta(days=1)
MINUTE = timedelta(minutes=1)
LOOKS_MISSED_MAX = 4
EXPIRED = billing_events_pb2.HoldExpired


async def end(world: World, word: Word, *jobs: str) -> list[str]:
    return await world.expiry().end({resource("o", job): word for job in jobs or ("ft-1",)})


async def renew(world: World, *resources: str) -> list[str]:
    async with transaction(world.pool) as connection:
        return await HoldStore(connection).renew(resources, TTL)


@pytest.mark.parametrize("late", ["usage", "end", "both"])
@pytest.mark.parametrize("hours", [30, 24 * 8])
async def test_what_comes_days_late_is_booked_and_charged_in_full(world: World, late: str, hours: int) -> None:
    await world.top_up("o", 20 * USD)
    await world.hold("o")
    run, over = whole_run("o"), ended("o", "COMPLETED", 16)
    nothing: list[Message] = []
    early, after = {"usage": ([over], run), "end": (run, [over]), "both": (nothing, [*run, over])}[late]
    await world.deliver(*early)
    await world.pass_time(timedelta(hours=hours))
    await OverdueWatch(world.pool, BillingSettings(), clock=world.clock).look()
    assert (await world.hold_row("o"))["state"] == "held"
    await world.deliver(*after)
    row = await world.hold_row("o")
    assert (row["state"], row["charged_nanos_usd"], row["discrepancy"]) == ("settled", 5 * USD, "")


async def test_a_published_end_that_never_came_keeps_the_hold(world: World) -> None:
    await world.top_up("o", 20 * USD)
    await world.hold("o")
    await world.pass_time(TTL)
    assert await end(world, Word.ENDED) == [resource("o")]
    assert (await world.hold_row("o"))["state"] == "held"
    # Somebody published it again.
    await world.deliver(*whole_run("o"), ended("o", "COMPLETED", 16))
    assert (await world.hold_row("o"))["charged_nanos_usd"] == 5 * USD


async def test_a_hold_stays_while_an_event_of_its_job_is_set_aside(world: World) -> None:
    await world.top_up("o", 20 * USD)
    await world.hold("o")
    run = whole_run("o")
    await world.deliver(*run[:-1], ended("o", "COMPLETED", 16))
    event = EventInfo(
        id=uuid.uuid4(), type=run[-1].DESCRIPTOR.full_name, source="test", subject=resource("o"), time=NOW, deliveries=1
    )
    async with transaction(world.pool) as connection:
        await set_aside(connection, consumer=DURABLE, event=event, message=run[-1], reason="INTERNAL", error="a defect")
    await world.pass_time(TTL)
    assert await end(world, Word.ENDED) == [resource("o")]
    await world.deliver(run[-1])
    row = await world.hold_row("o")
    assert (row["state"], row["charged_nanos_usd"], row["discrepancy"]) == ("settled", 5 * USD, "")


async def set_aside_and_discarded(world: World, message: Message) -> None:
    event = EventInfo(
        id=uuid.uuid4(),
        type=message.DESCRIPTOR.full_name,
        source="test",
        subject=resource("o"),
        time=NOW,
        deliveries=1,
    )
    async with transaction(world.pool) as connection:
        await set_aside(connection, consumer=DURABLE, event=event, message=message, reason="INTERNAL", error="hopeless")
    assert await end(world, Word.ENDED) == [resource("o")]
    async with transaction(world.pool) as connection:
        (letter,) = await list_dead_letters(connection, DURABLE, after=None, row_max=10)
        await discard(connection, DURABLE, letter.event_id, by="key_o", why="no version can read it")


async def test_a_discarded_event_lets_the_hold_end_by_what_is_booked(world: World) -> None:
    await world.top_up("o", 20 * USD)
    await world.hold("o")
    run = whole_run("o")
    await world.deliver(*run[:-1], ended("o", "COMPLETED", 16))
    await world.pass_time(TTL)
    await set_aside_and_discarded(world, run[-1])
    assert await end(world, Word.ENDED) == []
    row = await world.hold_row("o")
    assert (row["state"], row["charged_nanos_usd"]) == ("settled", 5 * USD)
    assert "1 of 16 usage records did not come" in row["discrepancy"]


async def test_a_discarded_ending_releases_the_hold_whole(world: World) -> None:
    await world.top_up("o", 20 * USD)
    await world.hold("o")
    await world.deliver(*whole_run("o"))
    await world.pass_time(TTL)
    await set_aside_and_discarded(world, ended("o", "COMPLETED", 16))
    assert await end(world, Word.ENDED) == []
    row = await world.hold_row("o")
    assert (row["state"], row["charged_nanos_usd"]) == ("expired", 0)
    assert (await world.balances("o"))["prepaid"] == 20 * USD


async def test_a_hold_of_a_job_that_does_not_exist_is_given_back_whole(world: World) -> None:
    await world.top_up("o", 5 * USD)
    await world.hold("o")
    await world.deliver(train("o", 0, 20))
    await world.pass_time(TTL - MINUTE)
    assert await end(world, Word.UNKNOWN) == [resource("o")]
    assert (await world.hold_row("o"))["state"] == "held"
    await world.pass_time(MINUTE)
    for _ in range(2):
        assert await end(world, Word.UNKNOWN) == []
    row = await world.hold_row("o")
    assert (row["state"], row["charged_nanos_usd"], row["end_time"]) == ("expired", 0, world.clock.now())
    balances = await world.balances("o")
    assert (balances["prepaid"], balances["held"], balances["revenue"]) == (5 * USD, 0, 0)
    kinds = await world.pool.fetch("SELECT kind FROM transactions ORDER BY position")
    assert [each["kind"] for each in kinds] == ["top_up", "hold", "release"]
    # What it did stays booked; over the job a report adds up to nothing.
    assert row["adjustment_nanos_usd"] == -20 * 1000 * 6100
    async with world.pool.acquire() as connection:
        day = world.clock.now().date()
        (cost,) = await UsageStore(connection).list_costs(
            "o", project_id="", start_day=day - TTL, end_day=day, dimensions=(), row_max=10
        )
    assert cost.amount_nanos_usd == 0
    (event,) = await world.events(EXPIRED)
    assert (event.resource, event.project_id, event.organization_id) == (resource("o"), "o-p", "o")
    assert event.released_nanos_usd == 5 * USD
    # What comes after is for a person to look at, the job's end is only remembered, and it is not held again.
    with pytest.raises(InvalidArgument, match="EVENT_INVALID"):
        await world.deliver(train("o", 20, 40))
    await world.deliver(ended("o", "COMPLETED", 16))
    with pytest.raises(InvalidArgument, match="expired before"):
        await world.deliver(train("o", 20, 40))
    with pytest.raises(FailedPrecondition, match="HOLD_EXPIRED"):
        await world.hold("o")
    assert (await world.hold_row("o"))["state"] == "expired"
    assert await world.release("o") == 0


async def test_a_job_that_ended_is_settled_by_what_is_booked(world: World) -> None:
    await world.top_up("o", 20 * USD)
    await world.hold("o")
    run = whole_run("o")
    await world.deliver(*run[:5], ended("o", "CANCELLED_RUNNING", 16))
    await world.pass_time(TTL)
    assert await end(world, Word.ENDED) == []
    row = await world.hold_row("o")
    # 100 of 200 steps, 100,000 tokens at 6.10 dollars a million.
    assert (row["state"], row["charged_nanos_usd"]) == ("settled", 610_000_000)
    assert "11 of 16 usage records did not come" in row["discrepancy"]
    assert row["adjustment_nanos_usd"] == 0
    assert (await world.balances("o"))["held"] == 0
    assert await world.events(EXPIRED) == []
    with pytest.raises(InvalidArgument, match="expired before"):
        await world.deliver(run[5])
    # One that was booked in time is still the same.
    before = await world.dump()
    await world.deliver(run[0])
    assert await world.dump() == before


async def test_a_completed_job_is_still_charged_no_more_than_its_hold(world: World) -> None:
    await world.top_up("o", 20 * USD)
    await world.hold("o")
    await world.deliver(*whole_run("o")[:-1], ended("o", "COMPLETED", 16))
    await world.pass_time(TTL)
    assert await end(world, Word.ENDED) == []
    row = await world.hold_row("o")
    assert (row["state"], row["charged_nanos_usd"], row["minimum_applied"]) == ("settled", 5 * USD, True)
    assert "1 of 16 usage records" in row["discrepancy"]


async def test_renewed_holds_live_on_and_others_are_named(world: World) -> None:
    await world.top_up("o", 100 * USD)
    for job in ("ft-1", "ft-2", "ft-3"):
        await world.hold("o", job)
    await world.release("o", "ft-2")
    await world.pass_time(TTL / 2)
    asked = [resource("o", job) for job in ("ft-1", "ft-2", "ft-4", "ft-1")]
    assert await renew(world, *asked) == [resource("o", "ft-2"), resource("o", "ft-4")]
    assert await renew(world) == []
    await world.pass_time(TTL / 2)
    asked = [resource("o", job) for job in ("ft-1", "ft-2", "ft-3")]
    assert await end(world, Word.UNKNOWN, "ft-1", "ft-2", "ft-3") == asked[:1]
    found = {job: (await world.hold_row("o", job))["state"] for job in ("ft-1", "ft-2", "ft-3")}
    assert found == {"ft-1": "held", "ft-2": "released", "ft-3": "expired"}
    # A renewal never brings an end nearer, and one that comes late but in time counts.
    async with transaction(world.pool) as connection:
        assert await HoldStore(connection).renew([resource("o", "ft-1")], timedelta(0)) == []
    assert await world.pool.fetchval("SELECT expire_time > now() FROM holds WHERE resource = $1", resource("o"))
    assert await renew(world, resource("o", "ft-3")) == [resource("o", "ft-3")]


async def test_renewals_and_endings_at_once_agree(world: World) -> None:
    await world.top_up("o", 100 * USD)
    jobs = [f"ft-{number}" for number in range(10)]
    for job in jobs:
        await world.hold("o", job)
    await world.pass_time(TTL)
    resources = [resource("o", job) for job in jobs]
    sweeps = [end(world, Word.UNKNOWN, *jobs) for _ in range(3)]
    renewals = [renew(world, each) for each in reversed(resources)]
    answers: list[Any] = await asyncio.gather(*renewals, *sweeps)
    told = {each for answer in answers[: len(renewals)] for each in answer}
    rows = await world.pool.fetch("SELECT resource, state, expire_time > now() AS lasts FROM holds")
    assert {row["resource"] for row in rows if row["state"] == "expired"} == told
    assert all(row["lasts"] for row in rows if row["state"] == "held")
    assert len(await world.events(EXPIRED)) == len(told)
    assert (await world.balances("o"))["held"] == (len(jobs) - len(told)) * 5 * USD


async def test_an_ending_that_waits_for_an_organization_keeps_no_hold_from_being_renewed(world: World) -> None:
    """Holds are locked last: a renewal locks many of them, in another order than that of the ending."""
    await world.top_up("o", 5 * USD)
    await world.hold("o")
    await world.pass_time(TTL)
    async with others_transaction(world.pool) as connection:
        await LedgerStore(connection).lock(["o"])
        sweeping = asyncio.create_task(end(world, Word.UNKNOWN))
        await waiting(world)
        # Were its hold locked by the ending, both would wait for each other, and the database would end one of them.
        assert await HoldStore(connection).renew([resource("o")], TTL) == []
    await sweeping
    assert (await world.hold_row("o"))["state"] == "held"


async def test_a_process_whose_clock_is_ahead_makes_no_hold_overdue(world: World) -> None:
    """The term of a hold is written and compared in the database's time."""
    await world.top_up("o", 20 * USD)
    await world.hold("o")
    world.clock.jump(timedelta(hours=30).total_seconds())
    assert await end(world, Word.UNKNOWN) == [resource("o")]
    assert (await world.hold_row("o"))["state"] == "held"
    # What it holds and renews lasts no longer than what others do.
    await world.hold("o", "ft-2")
    assert await renew(world, resource("o")) == []
    terms = await world.pool.fetch("SELECT expire_time - now() AS term FROM holds")
    assert all(TTL - 30 * MINUTE < row["term"] <= TTL for row in terms), terms
    # What the ledger says of it is of the clock that booked it.
    assert (await world.hold_row("o", "ft-2"))["hold_time"] == world.clock.now()


async def test_overdue_holds_are_listed_in_pages_by_name(world: World) -> None:
    await world.top_up("o", 100 * USD)
    for number in range(5):
        await world.hold("o", f"ft-{number}")
    await world.pass_time(TTL)
    names = [resource("o", f"ft-{number}") for number in range(5)]
    async with world.pool.acquire() as connection:
        holds = HoldStore(connection)
        assert await holds.list_expired(after="", row_max=2) == names[:2]
        assert await holds.list_expired(after=names[1], row_max=9) == names[2:]
        assert (await holds.count_expired()).held_nanos_usd == 5 * 5 * USD


def test_an_absence_begins_the_watch_anew() -> None:
    gap = 30.0 * LOOKS_MISSED_MAX
    clock = ManualClock()
    enough = AbsenceGuard(clock, gap_s_max=gap, watch_s_min=90.0)
    too_short = AbsenceGuard(clock, gap_s_max=gap, watch_s_min=91.0)
    for _ in range(3):
        clock.jump(30.0)
        enough.look()
        too_short.look()
    assert enough.may_judge
    assert not too_short.may_judge
    clock.jump(gap + 1)
    enough.look()
    assert not enough.may_judge
