"""Replicas and a billing between which requests and answers are lost, delayed and overtaken: what calls use never
exceeds the credit, and what they do not use comes back."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from chassis.clock import ManualClock
from chassis.errors import Aborted, DeadlineExceeded, DomainError, FailedPrecondition, Unavailable
from chassis.ids import SeededIds
from finemesh.credit.v1 import credit_lease_service_pb2 as pb
from services.billing.leasing.credit_lease import Leased, Room, Wish, grown, room_of
from services.inference.config import InferenceSettings
from services.inference.spending.credit_keeper import CreditKeeper
from services.inference.spending.lease_account import LeaseAccount, Spender

CREDIT = 1_000_000
LIFETIME_S = 120
SPENDERS = [Spender("o", "p", key) for key in ("k1", "k2")]
STEPS = 400


@dataclass
class Lease:
    holder: str
    granted: int = 0
    used: int = 0
    revision: int = 0
    closed: bool = False


@dataclass
class Billing:
    """Decides as billing does, on tables in memory. `chance` is how often a request or an answer goes astray."""

    seed: random.Random
    clock: ManualClock
    chance: float = 0.3
    credit: int = CREDIT
    leases: dict[str, Lease] = field(default_factory=dict)
    # With the moment at which their leases end.
    holders: dict[str, float] = field(default_factory=dict)
    # Requests whose callers gave up waiting; they may still arrive.
    late: list[Callable[[], object]] = field(default_factory=list)

    def room(self) -> Room:
        counted = [lease for lease in self.leases.values() if lease.closed or self.is_alive(lease.holder)]
        outstanding = sum(max(0, lease.granted - lease.used) for lease in counted)
        return room_of(self.credit, [], Leased(nanos_usd=outstanding))

    def is_alive(self, holder: str) -> bool:
        return self.holders.get(holder, 0.0) > self.clock.monotonic()

    def grant(self, request: pb.GrantCreditRequest) -> pb.GrantCreditResponse:
        if not self.is_alive(request.holder):
            raise Aborted("LEASE_STALE", "gone", metadata={"holder": request.holder})
        lease = self.leases.get(request.lease_id) or Lease(request.holder)
        if lease.closed or lease.revision >= request.revision:
            raise Aborted("LEASE_STALE", "late")
        wish = Wish(
            required_nanos_usd=request.required_nanos_usd,
            needed_nanos_usd=request.needed_nanos_usd,
            wanted_nanos_usd=request.wanted_nanos_usd,
        )
        room = self.room()
        total = grown(room, wish, granted_nanos_usd=lease.granted, share=8)
        if total < request.required_nanos_usd:
            told = {"available_nanos_usd": str(room.nanos_usd)}
            raise FailedPrecondition("BALANCE_INSUFFICIENT", "no", metadata=told)
        lease.granted, lease.revision = total, request.revision
        self.leases[request.lease_id] = lease
        return pb.GrantCreditResponse(granted_nanos_usd=total)

    def renew(self, request: pb.RenewCreditLeasesRequest) -> pb.RenewCreditLeasesResponse:
        known = self.is_alive(request.holder)
        if known or request.holder not in self.holders:
            self.holders[request.holder] = self.clock.monotonic() + LIFETIME_S
        for each in request.returns:
            lease = self.leases.get(each.lease_id)
            if lease is not None and not lease.closed and lease.revision < each.revision:
                lease.granted, lease.revision = min(lease.granted, each.granted_nanos_usd), each.revision
                lease.closed = each.closed
        recalled = [id for id, lease in self.leases.items() if lease.holder == request.holder and not lease.closed]
        if request.leaving:
            self.holders[request.holder] = 0.0
        return pb.RenewCreditLeasesResponse(
            known=known,
            lease_duration=Duration(seconds=LIFETIME_S),
            recalled_lease_ids=[id for id in recalled if self.seed.random() < 0.3],
        )

    def book(self, lease_id: str, amount: int) -> None:
        self.credit -= amount
        if lease_id in self.leases:
            self.leases[lease_id].used += amount

    def unary_unary(self, method: str, **_: Any) -> Callable[..., Awaitable[Any]]:
        """As the channel of the replicas."""
        handler: Callable[[Any], object] = self.grant if method.endswith("GrantCredit") else self.renew

        async def call(request: Any, *, timeout: float) -> object:
            # Others go on while it is under way.
            for _ in range(self.seed.randrange(4)):
                await asyncio.sleep(0)
            astray = self.seed.random() < self.chance
            fate = self.seed.choice(["lost", "late", "unanswered"]) if astray else "answered"
            if fate == "lost":
                raise Unavailable("DEPENDENCY_UNAVAILABLE", "lost")
            if fate == "late":
                self.late.append(lambda: handler(request))
                raise DeadlineExceeded("DEADLINE_TOO_SHORT", "late")
            answer = handler(request)
            for _ in range(self.seed.randrange(4)):
                await asyncio.sleep(0)
            if fate == "unanswered":
                raise Unavailable("DEPENDENCY_UNAVAILABLE", "unanswered")
            return answer

        return call

    def arrive_late(self) -> None:
        if self.late:
            request = self.late.pop(self.seed.randrange(len(self.late)))
            try:
                request()
            except DomainError:
                # Nobody hears the answer.
                return


@dataclass
class World:
    seed: random.Random
    billing: Billing
    clock: ManualClock
    replicas: list[CreditKeeper]
    # Calls that go on, and use that is not booked yet.
    open_calls: list[tuple[LeaseAccount, int]] = field(default_factory=list)
    unbooked: list[tuple[str, int]] = field(default_factory=list)
    served: int = 0
    exposed: int = 0
    waits_s: tuple[float, ...] = (0.1, 1.1, 11.0)

    async def begin(self) -> None:
        replica, spender = self.seed.choice(self.replicas), self.seed.choice(SPENDERS)
        amount = self.seed.randrange(1, CREDIT // 20)
        try:
            account = await replica.reserve(replica.account(spender), amount, what="the call")
        except DomainError:
            return
        self.open_calls.append((account, amount))

    async def end(self) -> None:
        if self.open_calls:
            account, amount = self.open_calls.pop(self.seed.randrange(len(self.open_calls)))
            used = self.seed.randrange(amount + 1)
            account.settle(amount, used)
            self.served += used
            self.unbooked.append((account.lease_id, used))

    async def book(self) -> None:
        if self.unbooked:
            self.billing.book(*self.unbooked.pop(self.seed.randrange(len(self.unbooked))))

    async def renew(self) -> None:
        try:
            await self.seed.choice(self.replicas).renew()
        except DomainError:
            return

    async def arrive(self) -> None:
        self.billing.arrive_late()

    async def wait(self) -> None:
        """Sometimes so long that the leases of a replica end, whose calls go on; what they may overspend is exposed."""
        living = [holder for holder in self.billing.holders if self.billing.is_alive(holder)]
        self.clock.jump(self.seed.choice(self.waits_s))
        ended = {holder for holder in living if not self.billing.is_alive(holder)}
        lost = {id for id, lease in self.billing.leases.items() if lease.holder in ended and not lease.closed}
        self.exposed += sum(amount for account, amount in self.open_calls if account.lease_id in lost)
        self.exposed += sum(amount for lease_id, amount in self.unbooked if lease_id in lost)

    async def burst(self) -> None:
        await asyncio.gather(*(self.begin() for _ in range(10)), self.renew(), self.end())


async def lived(seed: int, waits_s: tuple[float, ...]) -> World:
    """Some hundred random steps."""
    chosen, clock = random.Random(seed), ManualClock()
    billing = Billing(chosen, clock)
    settings = InferenceSettings(credit_chunk_nanos_usd=CREDIT // 10)
    channel: Any = billing
    replicas = [CreditKeeper(channel, settings=settings, clock=clock, ids=SeededIds(n, clock)) for n in range(2)]
    world = World(chosen, billing, clock, replicas, waits_s=waits_s)
    for _ in range(STEPS):
        step = chosen.choice([world.begin, world.end, world.book, world.renew, world.arrive, world.wait, world.burst])
        await step()
        reserved = sum(amount for _, amount in world.open_calls)
        assert world.served + reserved <= CREDIT + world.exposed
    return world


@pytest.mark.parametrize("seed", range(30))
async def test_nothing_is_overspent_and_nothing_is_lost(seed: int) -> None:
    # Never so long that a replica's leases end before it renews: two steps in seven do, or a call that waits does.
    world = await lived(seed, waits_s=(0.1, 1.1))
    billing = world.billing
    assert world.exposed == 0
    assert world.served > CREDIT // 4
    # Everything ends and every message arrives: what was not used is there again.
    billing.chance = 0.0
    while billing.late:
        billing.arrive_late()
    while world.open_calls:
        await world.end()
    while world.unbooked:
        await world.book()
    for replica in world.replicas:
        await replica.close()
    assert billing.credit == CREDIT - world.served
    assert billing.room() == Room(nanos_usd=billing.credit)


@pytest.mark.parametrize("seed", range(30))
async def test_a_replica_that_is_cut_off_overspends_at_most_what_it_had_reserved(seed: int) -> None:
    world = await lived(seed, waits_s=(0.1, 1.1, 11.0, 70.0, 130.0))
    assert len(world.billing.holders) > 2
