"""Places of quotes are counted by all replicas, and those of a dead one come free by the database's time."""

import asyncio
from contextlib import AsyncExitStack
from uuid import uuid4

import pytest

from chassis.errors import ResourceExhausted
from chassis.identity import Caller
from services.scheduler.admission.quotes_in_line import QuotesInLine
from services.scheduler.admission.store import AdmissionStore
from services.scheduler.retention_rules import retention_rules
from tests.store.scheduler.world import World

KEY = Caller(service="gateway", tenant="proj_a", account="org_a", subject="key_a")


def replica(world: World) -> QuotesInLine:
    settings = world.settings.model_copy(update={"quotes_per_key_max": 3})
    return QuotesInLine(world.database, world.clock, settings)


async def later(world: World, seconds: float) -> None:
    await world.pool.execute("UPDATE quote_places SET expire_time = expire_time - make_interval(secs => $1)", seconds)


async def test_replicas_that_ask_at_once_give_a_key_its_places_and_no_more(world: World) -> None:
    replicas, done, refused = [replica(world), replica(world)], asyncio.Event(), 0

    async def ask(number: int) -> bool:
        nonlocal refused
        try:
            async with replicas[number % 2].place(KEY):
                await done.wait()
                return True
        except ResourceExhausted:
            refused += 1
            if refused == 5:
                done.set()
            return False

    async with asyncio.timeout(20):
        assert sum(await asyncio.gather(*(ask(number) for number in range(8)))) == 3
    assert await world.pool.fetchval("SELECT count(*) FROM quote_places") == 0


async def test_the_places_of_a_dead_replica_come_free_and_those_of_a_living_one_do_not(world: World) -> None:
    living, asking = replica(world), replica(world)
    lease_s = world.settings.quote_place_s
    async with AsyncExitStack() as held:
        # Of a replica that was killed: nobody renews these, and nobody gives them back.
        for _ in range(2):
            async with world.database.writing() as connection:
                assert await AdmissionStore(connection).take_quote_place(
                    uuid4(), account="org_a", subject="key_a", per_key_max=3, duration_s=lease_s
                )
        await held.enter_async_context(living.place(KEY))
        await later(world, lease_s - 1.0)
        await living.renew()
        with pytest.raises(ResourceExhausted) as refused:
            await held.enter_async_context(asking.place(KEY))
        assert refused.value.metadata["limit"] == "quotes_per_key_max"
        await later(world, 2.0)
        for _ in range(2):
            await held.enter_async_context(asking.place(KEY))
        with pytest.raises(ResourceExhausted):
            await held.enter_async_context(asking.place(KEY))
        rule = next(rule for rule in retention_rules(world.settings) if rule.name == "quote_places")
        async with world.database.writing() as connection:
            assert await rule.delete(connection, 10) == 2
    assert await world.pool.fetchval("SELECT count(*) FROM quote_places") == 0
