"""Top-ups, holds and releases on the real database, one at a time and all at once."""

import asyncio
from itertools import count

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chassis.db.pool import transaction
from chassis.errors import AlreadyExists, DomainError, FailedPrecondition, OutOfRange
from services.billing.ledger.top_up import add_credit
from services.billing.limits import Limits
from services.billing.prices.pricing import Work
from tests.store.billing.world import LARGE, SMALL, USD, World, ended, evaluate, minute, train, whole_run

_numbers = count(1)


async def test_a_quote_is_held_at_once_and_once(world: World) -> None:
    await world.top_up("o", 20 * USD)
    hold = await world.hold("o")
    assert hold.held_nanos_usd == 5 * USD
    assert await world.hold("o") == hold
    balances = await world.balances("o")
    assert (balances["prepaid"], balances["held"]) == (15 * USD, 5 * USD)


async def test_too_little_credit_says_how_much_is_missing_and_leaves_nothing(world: World) -> None:
    await world.top_up("o", 2 * USD)
    before = await world.dump()
    with pytest.raises(FailedPrecondition) as refused:
        await world.hold("o")
    assert refused.value.reason == "BALANCE_INSUFFICIENT"
    assert refused.value.metadata == {
        "required_nanos_usd": str(5 * USD),
        "available_nanos_usd": str(2 * USD),
        "shortfall_nanos_usd": str(3 * USD),
    }
    assert "add at least 3.00 USD" in refused.value.message
    assert await world.dump() == before


async def test_a_job_is_quoted_once(world: World) -> None:
    await world.top_up("o", 100 * USD)
    await world.hold("o")
    with pytest.raises(AlreadyExists, match="other numbers"):
        await world.hold("o", work=LARGE)


async def test_top_ups_are_idempotent(world: World) -> None:
    first = await world.top_up("o", USD, "r")
    assert await world.top_up("o", USD, "r") == first
    assert await world.top_up("o", USD, "s") != first
    assert (await world.balances("o"))["prepaid"] == 2 * USD
    with pytest.raises(AlreadyExists, match="REQUEST_ID_REUSED"):
        await world.top_up("o", 2 * USD, "r")
    assert await world.top_up("other", 2 * USD, "r") != first


async def test_credit_that_is_used_makes_room_for_more(world: World) -> None:
    """The limit is one of what an organization has, not of what it ever paid."""
    limits = Limits(amount_nanos_usd_max=10 * USD)

    async def top_up(amount: int, request_id: str) -> None:
        async with transaction(world.pool) as connection:
            await add_credit(
                connection,
                organization_id="o",
                amount_nanos_usd=amount,
                request_id=request_id,
                now=world.clock.now(),
                limits=limits,
            )

    await top_up(10 * USD, "first")
    await world.hold("o")
    with pytest.raises(OutOfRange, match="a balance is at most 10000000000"):
        await top_up(1, "second")
    await world.deliver(minute("o", 0, "nvidia-h100-80gb", 50))
    with pytest.raises(OutOfRange):
        await top_up(2_800_000_001, "second")
    await top_up(2_800_000_000, "second")


async def test_a_release_gives_everything_back_once(world: World) -> None:
    await world.top_up("o", 5 * USD)
    await world.hold("o")
    assert await world.release("o") == 5 * USD
    assert await world.release("o") == 0
    assert await world.release("o", "ft-unknown") == 0
    assert (await world.balances("o"))["prepaid"] == 5 * USD
    with pytest.raises(FailedPrecondition, match="released already"):
        await world.hold("o")


async def test_a_job_that_ran_is_settled_not_released(world: World) -> None:
    await world.top_up("o", 5 * USD)
    await world.hold("o")
    await world.deliver(train("o", 0, 20))
    with pytest.raises(FailedPrecondition, match="has run"):
        await world.release("o")


async def test_a_job_whose_usage_is_on_its_way_is_not_released(world: World) -> None:
    """Its final event came first: released now, what it did could not be booked any more
    and nobody would pay for it."""
    await world.top_up("o", 5 * USD)
    await world.hold("o")
    await world.deliver(ended("o", "CANCELLED_RUNNING", 2))
    with pytest.raises(FailedPrecondition, match="has run"):
        await world.release("o")
    await world.deliver(train("o", 0, 20), evaluate("o", 1))
    assert (await world.hold_row("o"))["charged_nanos_usd"] == 152_500_000


async def test_nothing_can_be_held_for_a_job_that_ended(world: World) -> None:
    """The scheduler gave up waiting for the hold, refused the job, and then the late call arrives."""
    await world.top_up("o", 5 * USD)
    await world.deliver(ended("o", "REFUSED", 0))
    with pytest.raises(FailedPrecondition, match="has ended"):
        await world.hold("o")
    assert (await world.balances("o"))["prepaid"] == 5 * USD


async def test_the_same_hold_asked_for_many_times_at_once_is_one(world: World) -> None:
    await world.top_up("o", 100 * USD)
    holds = await asyncio.gather(*(world.hold("o") for _ in range(20)))
    assert len({hold.id for hold in holds}) == 1
    assert (await world.balances("o"))["held"] == 5 * USD


class _CrashError(Exception):
    """Stands for a process that dies before its commit."""


jobs = st.sampled_from(["ft-1", "ft-2", "ft-3"])
steps = st.one_of(
    st.tuples(st.just("top_up"), st.sampled_from(["a", "b", "c"])),
    st.tuples(st.just("hold"), jobs),
    st.tuples(st.just("release"), jobs),
    st.tuples(st.just("usage"), jobs),
    st.tuples(st.sampled_from(["COMPLETED", "CANCELLED_RUNNING", "PLATFORM_FAILURE"]), jobs),
)


async def _take(world: World, organization: str, step: tuple[str, str], crash: bool) -> None:
    """One step in one transaction; what the rules refuse changes nothing, and neither does a crash."""
    what, which = step
    try:
        async with transaction(world.pool) as connection:
            if what == "top_up":
                await world.top_up_on(connection, organization, 6 * USD, which)
            elif what == "hold":
                await world.hold_on(connection, organization, which, SMALL)
            elif what == "release":
                await world.release_on(connection, organization, which)
            elif what == "usage":
                await world.handle(connection, train(organization, 0, 100, which))
            else:
                await world.handle(connection, ended(organization, what, 1, which))
            if crash:
                raise _CrashError
    except (DomainError, _CrashError):
        return


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(steps, st.booleans()), min_size=1, max_size=24), st.booleans())
async def test_any_interleaving_keeps_the_books_balanced(
    world: World, plan: list[tuple[tuple[str, str], bool]], together: bool
) -> None:
    organization = f"o{next(_numbers)}"
    if together:
        await asyncio.gather(*(_take(world, organization, step, crash) for step, crash in plan))
    else:
        for step, crash in plan:
            await _take(world, organization, step, crash)
    balances = await world.balances(organization)
    posted = await world.pool.fetch(
        "SELECT account, sum(amount_nanos_usd)::bigint AS total FROM postings"
        " WHERE organization_id = $1 GROUP BY account",
        organization,
    )
    assert {row["account"]: row["total"] for row in posted if row["total"]} == {k: v for k, v in balances.items() if v}
    assert sum(balances.values()) == 0
    assert balances.get("prepaid", 0) >= 0
    holds = await world.pool.fetch("SELECT * FROM holds WHERE organization_id = $1", organization)
    assert balances.get("held", 0) == sum(row["held_nanos_usd"] for row in holds if row["state"] == "held")
    assert balances.get("revenue", 0) == sum(row["charged_nanos_usd"] for row in holds)
    settlements = await world.pool.fetchval(
        "SELECT count(*) FROM transactions WHERE organization_id = $1 AND kind IN ('settlement', 'release')",
        organization,
    )
    assert settlements == sum(row["state"] != "held" for row in holds)


async def test_holds_of_other_sizes_share_one_balance(world: World) -> None:
    await world.top_up("o", 20 * USD)
    works: list[Work] = [LARGE, SMALL, SMALL]
    outcomes = await asyncio.gather(
        *(world.hold("o", f"ft-{number}", work) for number, work in enumerate(works)), return_exceptions=True
    )
    held = sum(outcome.held_nanos_usd for outcome in outcomes if not isinstance(outcome, BaseException))
    assert held <= 20 * USD
    assert (await world.balances("o"))["held"] == held


async def test_each_organization_settles_from_its_own_hold(world: World) -> None:
    for organization in ("one", "two"):
        await world.top_up(organization, 5 * USD)
        await world.hold(organization)
    await world.deliver(*whole_run("one"), ended("one", "COMPLETED", 16), evaluate("two", 1))
    assert (await world.balances("one"))["revenue"] == 5 * USD
    assert (await world.balances("two"))["held"] == 5 * USD
