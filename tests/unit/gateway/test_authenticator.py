"""Authentication without a database: what each wrong key is told, how long an answer is remembered."""

import asyncio
from dataclasses import replace

import pytest

from chassis.clock import ManualClock
from chassis.errors import ResourceExhausted, Unauthenticated
from services.gateway.identity import keys
from services.gateway.identity.authenticator import Authenticator
from services.gateway.identity.domain import KeyHolder
from services.gateway.identity.rate_limit import RateLimiter

SECRET = keys.new_secret()
HOLDER = KeyHolder(
    key_id="key_1",
    project_id="proj_1",
    organization_id="org_1",
    slug="acme",
    roles=frozenset({"member"}),
    secret_sha256=keys.digest(SECRET),
    revoked=False,
)


class World:
    def __init__(
        self, *, cache_s: float = 2.0, burst: int = 100, cache_size_max: int = 10, lookups_max: int = 100
    ) -> None:
        self.clock = ManualClock()
        self.holders = {HOLDER.secret_sha256: HOLDER}
        self.lookups = 0
        self.asked = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()
        limiter = RateLimiter(rate_per_s=10, burst=burst, keys_max=10)
        self.authenticator = Authenticator(
            self.find, limiter, self.clock, cache_s=cache_s, cache_size_max=cache_size_max, lookups_max=lookups_max
        )

    async def find(self, secret_sha256: bytes) -> KeyHolder | None:
        self.lookups += 1
        self.asked.set()
        found = self.holders.get(secret_sha256)
        await self.gate.wait()
        return found

    def revoke(self) -> None:
        self.holders[HOLDER.secret_sha256] = replace(HOLDER, revoked=True)


async def test_a_key_speaks_for_its_project():
    caller = await World().authenticator.caller(f"Bearer {SECRET}")
    assert (caller.tenant, caller.account, caller.subject, caller.namespace) == ("proj_1", "org_1", "key_1", "acme")
    assert (caller.roles, caller.service) == (frozenset({"member"}), "")


@pytest.mark.parametrize(
    ("authorization", "reason"),
    [
        ("", "API_KEY_MISSING"),
        ("Bearer", "API_KEY_INVALID"),
        ("Bearer ", "API_KEY_INVALID"),
        (f"Basic {SECRET}", "API_KEY_INVALID"),
        ("Bearer fm_short", "API_KEY_INVALID"),
        (f"Bearer {SECRET}x", "API_KEY_INVALID"),
        (f"Bearer {keys.new_secret()}", "API_KEY_INVALID"),
        ("Bearer \x00\ud800", "API_KEY_INVALID"),
    ],
    # Their own texts would name the tests otherwise in each process of a run.
    ids=["nothing", "no key", "empty key", "another scheme", "short", "too long", "unknown", "no text"],
)
async def test_a_wrong_key_is_told_what_is_wrong(authorization, reason):
    with pytest.raises(Unauthenticated) as told:
        await World().authenticator.caller(authorization)
    assert told.value.reason == reason
    assert SECRET not in str(told.value)


async def test_malformed_keys_never_reach_the_database():
    world = World()
    for authorization in ("", "Bearer fm_x", f"Bearer {SECRET[:-1]}0"):
        with pytest.raises(Unauthenticated):
            await world.authenticator.caller(authorization)
    assert world.lookups == 0


async def test_a_revocation_elsewhere_takes_effect_within_the_cache_time():
    world = World()
    await world.authenticator.caller(f"Bearer {SECRET}")
    world.revoke()
    await world.clock.advance(1.9)
    await world.authenticator.caller(f"Bearer {SECRET}")
    await world.clock.advance(0.2)
    with pytest.raises(Unauthenticated, match="API_KEY_REVOKED"):
        await world.authenticator.caller(f"Bearer {SECRET}")
    assert world.lookups == 2


async def test_a_revocation_here_takes_effect_at_once_even_against_a_look_up_on_its_way():
    world = World()
    world.gate.clear()
    early = asyncio.create_task(world.authenticator.caller(f"Bearer {SECRET}"))
    await world.asked.wait()
    world.revoke()
    world.authenticator.forget_all()
    world.gate.set()
    await early
    with pytest.raises(Unauthenticated, match="API_KEY_REVOKED"):
        await world.authenticator.caller(f"Bearer {SECRET}")


async def test_calls_at_once_ask_the_database_once_and_survive_a_caller_that_leaves():
    world = World()
    world.gate.clear()
    calls = [asyncio.create_task(world.authenticator.caller(f"Bearer {SECRET}")) for _ in range(20)]
    await world.asked.wait()
    calls[0].cancel()
    world.gate.set()
    callers = await asyncio.gather(*calls[1:])
    assert world.lookups == 1
    assert len({caller.subject for caller in callers}) == 1


async def test_a_failing_database_fails_the_call_and_is_not_remembered():
    world = World()

    async def broken(_: bytes) -> KeyHolder | None:
        raise ConnectionError

    authenticator = Authenticator(
        broken, RateLimiter(rate_per_s=1, burst=1, keys_max=1), world.clock, cache_s=2, cache_size_max=1, lookups_max=1
    )
    with pytest.raises(ConnectionError):
        await authenticator.caller(f"Bearer {SECRET}")


async def test_made_up_keys_do_not_keep_out_one_that_was_used_lately():
    world = World(lookups_max=1)
    await world.authenticator.caller(f"Bearer {SECRET}")
    await world.clock.advance(3)
    world.asked.clear()
    world.gate.clear()
    made_up = asyncio.create_task(world.authenticator.caller(f"Bearer {keys.new_secret()}"))
    await world.asked.wait()
    with pytest.raises(ResourceExhausted) as told:
        await world.authenticator.caller(f"Bearer {keys.new_secret()}")
    assert told.value.metadata["limit"] == "key_lookups_max"
    known = asyncio.create_task(world.authenticator.caller(f"Bearer {SECRET}"))
    world.gate.set()
    assert (await known).subject == "key_1"
    with pytest.raises(Unauthenticated, match="API_KEY_INVALID"):
        await made_up


async def test_the_cache_is_bounded():
    world = World(cache_size_max=2)
    secrets = [keys.new_secret() for _ in range(3)]
    for secret in secrets:
        world.holders[keys.digest(secret)] = replace(HOLDER, secret_sha256=keys.digest(secret))
        await world.authenticator.caller(f"Bearer {secret}")
    await world.authenticator.caller(f"Bearer {secrets[2]}")
    assert world.lookups == 3
    await world.authenticator.caller(f"Bearer {secrets[0]}")
    assert world.lookups == 4


async def test_too_many_calls_are_told_when_to_come_again():
    world = World(burst=2)
    for _ in range(2):
        await world.authenticator.caller(f"Bearer {SECRET}")
    with pytest.raises(ResourceExhausted) as told:
        await world.authenticator.caller(f"Bearer {SECRET}")
    assert told.value.reason == "RATE_LIMITED"
    assert told.value.retry_after_s == pytest.approx(0.1)
