"""The database lets a name mean one thing, also when two ask for it in the same moment."""

from __future__ import annotations

import asyncio

import pytest

from chassis.db.pool import Pool, transaction
from services.inference.models.domain import NameKind
from services.inference.models.store import ModelStore


@pytest.mark.parametrize("commits", [True, False])
async def test_of_two_claims_at_once_one_gets_the_name(pool: Pool, commits: bool) -> None:
    name, claimed, decided = f"demo/contested-{commits}", asyncio.Event(), asyncio.Event()

    async def first() -> None:
        async with transaction(pool) as connection:
            assert await ModelStore(connection).claim_name(name, NameKind.ENDPOINT, owner="ep_1")
            claimed.set()
            await decided.wait()
            if not commits:
                raise ZeroDivisionError

    async def second() -> bool:
        async with transaction(pool) as connection:
            return await ModelStore(connection).claim_name(name, NameKind.TUNED, owner="job")

    holder = asyncio.create_task(first())
    await claimed.wait()
    other = asyncio.create_task(second())
    while not await pool.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
        await asyncio.sleep(0)
    decided.set()
    assert await other is not commits
    await asyncio.gather(holder, return_exceptions=True)
    async with pool.acquire() as connection:
        kind = await ModelStore(connection).name_kind(name)
    assert kind == (NameKind.ENDPOINT if commits else NameKind.TUNED)
