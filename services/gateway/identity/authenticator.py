"""From an API key to the caller it speaks for, with a rate limit per key. It knows no method and no transport."""

import asyncio
import hashlib
import hmac
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping

from chassis.clock import Clock
from chassis.errors import ResourceExhausted, Unauthenticated
from chassis.identity import Caller
from services.gateway.identity import keys
from services.gateway.identity.domain import KeyHolder
from services.gateway.identity.key_watch import revoked
from services.gateway.identity.rate_limit import RateLimiter

# Looks a key up by the SHA-256 of its secret.
FindKey = Callable[[bytes], Awaitable[KeyHolder | None]]

_SCHEME = "bearer "


class Authenticator:
    """Remembers found keys for `cache_s` seconds; a key revoked by this process is forgotten at once."""

    def __init__(
        self,
        find_key: FindKey,
        limiter: RateLimiter,
        clock: Clock,
        *,
        cache_s: float,
        cache_size_max: int,
        lookups_max: int,
    ) -> None:
        self._find_key = find_key
        self._limiter = limiter
        self._clock = clock
        self._cache_s = cache_s
        self._cache_size_max = cache_size_max
        self._lookups_max = lookups_max
        self._waiting = 0
        self._cache: OrderedDict[bytes, tuple[Caller, float]] = OrderedDict()
        self._lookups: dict[bytes, asyncio.Task[Caller]] = {}
        # Counts revocations: a look-up that began before one must not be remembered after it.
        self._generation = 0

    async def __call__(self, metadata: Mapping[str, str], _method: str) -> Caller:
        """For a gRPC server; metadata keys are in lower case."""
        return await self.caller(metadata.get("authorization", ""))

    async def caller(self, authorization: str) -> Caller:
        """Unauthenticated says whether the key is missing, unknown or revoked; ResourceExhausted when to come again."""
        now_s = self._clock.monotonic()
        # By its hash, so that no secret is kept and how long the look-up takes says nothing about those that exist.
        slot = hashlib.sha256(authorization.encode(errors="replace")).digest()
        remembered = self._cache.get(slot)
        if remembered is not None and remembered[1] > now_s:
            caller = remembered[0]
        else:
            caller = await self._wait(slot, _secret_of(authorization))
        wait_s = self._limiter.take(caller.subject, now_s)
        if wait_s > 0:
            raise ResourceExhausted(
                "RATE_LIMITED", "this key makes too many calls; try again after the given delay", retry_after_s=wait_s
            )
        return caller

    def forget_all(self) -> None:
        """After a revocation: the next call of every key asks the database again."""
        self._generation += 1
        self._cache.clear()
        self._lookups.clear()

    async def _wait(self, slot: bytes, secret: str) -> Caller:
        """Bounded, because anybody can make up keys. A key that was used lately is not refused for that."""
        if self._waiting >= self._lookups_max and slot not in self._cache:
            raise ResourceExhausted(
                "CONCURRENCY_LIMIT",
                f"{self._lookups_max} calls wait for their keys to be looked up, the most here (key_lookups_max); try"
                " again in a moment",
                metadata={"limit": "key_lookups_max", "limit_count": str(self._lookups_max)},
                retry_after_s=1.0,
            )
        self._waiting += 1
        try:
            return await self._look_up(slot, secret)
        finally:
            self._waiting -= 1

    async def _look_up(self, slot: bytes, secret: str) -> Caller:
        # Many calls arrive with one key at once; the database is asked once for all of them.
        running = self._lookups.get(slot)
        if running is None:
            running = asyncio.create_task(self._find(slot, keys.digest(secret)))
            self._lookups[slot] = running
            running.add_done_callback(lambda task: self._end_look_up(slot, task))
        # Shielded: a caller that gives up must not take the answer from the others.
        return await asyncio.shield(running)

    def _end_look_up(self, slot: bytes, task: asyncio.Task[Caller]) -> None:
        if self._lookups.get(slot) is task:
            del self._lookups[slot]
        if not task.cancelled():
            # Seen here as well, so that an error whose callers all left is not reported as forgotten.
            task.exception()

    async def _find(self, slot: bytes, secret_sha256: bytes) -> Caller:
        generation = self._generation
        holder = await self._find_key(secret_sha256)
        if holder is None or not hmac.compare_digest(holder.secret_sha256, secret_sha256):
            raise _invalid()
        if holder.revoked:
            raise revoked()
        caller = Caller(
            service="",
            tenant=holder.project_id,
            account=holder.organization_id,
            subject=holder.key_id,
            roles=holder.roles,
            namespace=holder.slug,
        )
        if generation == self._generation and self._cache_s > 0:
            self._cache[slot] = (caller, self._clock.monotonic() + self._cache_s)
            self._cache.move_to_end(slot)
            if len(self._cache) > self._cache_size_max:
                self._cache.popitem(last=False)
        return caller


def _secret_of(authorization: str) -> str:
    if not authorization:
        raise Unauthenticated(
            "API_KEY_MISSING", "the call carries no API key; send the metadata `authorization: Bearer fm_...`"
        )
    if authorization[: len(_SCHEME)].lower() != _SCHEME:
        raise _invalid()
    secret = authorization[len(_SCHEME) :].strip()
    if not keys.is_well_formed(secret):
        raise _invalid()
    return secret


def _invalid() -> Unauthenticated:
    return Unauthenticated("API_KEY_INVALID", "this API key is unknown; check that it was copied whole")
