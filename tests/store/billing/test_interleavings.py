"""Money under fire: several callers at once, each insisting on its work while its connections die at any statement.

Afterwards the chain says in which order everything happened. That order is replayed against a model that was written
from the rules; every answer that a caller got must be true in it, and nothing may be there that nobody asked for.
"""

import asyncio
import random
import uuid
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from google.protobuf.message import Message

from chassis.bus.envelope import EventInfo
from chassis.bus.outbox import Outbox
from chassis.clock import ManualClock
from chassis.db.pool import transaction
from chassis.errors import DomainError
from chassis.ids import SystemIds
from services.billing.audit.verification import Verification
from services.billing.config import BillingSettings
from services.billing.events import Events
from services.billing.holds import settlement
from services.billing.holds.expiry import Expiry, Word
from services.billing.holds.settlement import Ending
from services.billing.holds.store import HoldStore
from services.billing.invoices import crediting
from services.billing.invoices.crediting import Correction
from services.billing.limits import FactLimits, Limits
from services.billing.prices.pricing import Metered, Work, quote
from tests.store.billing.crashes import Doom, FragilePool, insisting
from tests.store.billing.model import Read, of_kind, read
from tests.store.billing.world import LARGE, NOW, SMALL, USD, World, at, ended, hour, minute, resource, served, train

CALLERS = 5
JOBS_PER_CALLER = 5
ORGANIZATIONS = ("a", "b")
# Nobody waits for a hold to be overdue: it is from the start, and no renewal puts off an end that the sweep looks at.
OVERDUE = timedelta(days=-2)
# How each job ends; two callers who tell an ending tell the same one.
JOBS: dict[str, tuple[Work, str, int]] = {
    "ft-1": (SMALL, "CANCELLED_RUNNING", 2),
    "ft-2": (SMALL, "STOPPED_EARLY", 1),
    "ft-3": (LARGE, "USER_FAILURE", 3),
    "ft-4": (LARGE, "PLATFORM_FAILURE", 1),
    "ft-5": (SMALL, "CANCELLED_BEFORE_RUN", 0),
    "ft-6": (SMALL, "CANCELLED_RUNNING", 3),
    "ft-7": (LARGE, "STOPPED_EARLY", 3),
    "ft-8": (SMALL, "USER_FAILURE", 2),
}


@dataclass(frozen=True)
class Step:
    kind: str
    organization: str
    # Which top-up, job, range of steps or call; equal steps of several callers are the same work.
    which: str
    number: int = 0


@dataclass(frozen=True)
class Heard:
    """What a caller was told: `before` and `after` are how long the chain was when it asked and when it heard."""

    step: Step
    answer: Any
    before: int
    after: int

    @property
    def job(self) -> str:
        return resource(self.step.organization, self.step.which)

    @property
    def refused(self) -> bool:
        return isinstance(self.answer, DomainError)


@dataclass
class Caller:
    """Takes its steps in turn; none is given up before it is answered."""

    world: World
    pool: FragilePool
    heard: list[Heard] = field(default_factory=list)

    async def run(self, steps: list[Step]) -> None:
        for step in steps:
            before = await self._length(step.organization)
            try:
                answer: Any = await insisting(partial(self._attempt, step))
            except DomainError as refusal:
                answer = refusal
            self.heard.append(Heard(step, answer, before, await self._length(step.organization)))

    async def _length(self, organization: str) -> int:
        query = "SELECT position FROM chains WHERE organization_id = $1"
        return await insisting(lambda: self.world.pool.fetchval(query, organization)) or 0

    async def _attempt(self, step: Step) -> Any:
        if step.kind == "expire":
            return await self._expire()
        async with transaction(self.pool) as connection:  # type: ignore[arg-type]
            if step.kind == "renew":
                # As the scheduler does: holds of all organizations in one call.
                resources = [resource(organization, job) for job in JOBS for organization in ORGANIZATIONS]
                return await HoldStore(connection).renew(resources, OVERDUE)
            if step.kind == "top_up":
                return await self.world.top_up_on(connection, step.organization, amount(step), step.which)
            if step.kind == "hold":
                return await self.world.hold_on(connection, step.organization, step.which, JOBS[step.which][0])
            if step.kind == "credit_note":
                outbox = self._outbox(self.world.clock)
                return await crediting.give_back(
                    connection, outbox, correction(step), now=self.world.clock.now(), limits=Limits()
                )
            if step.kind == "release":
                return await self.world.release_on(connection, step.organization, step.which)
            message = event(step)
            events = Events(self.world.catalogue, FactLimits(), self._outbox(self.world.clock), clock=self.world.clock)
            info = EventInfo(id=uuid.uuid4(), type="", source="test", subject="", time=NOW, deliveries=1)
            await events.handlers[type(message)](connection, message, info)
            return None

    async def _expire(self) -> None:
        """The scheduler says that it knows none of the jobs whose hold is overdue, as all are from the start."""
        clock = ManualClock(NOW + timedelta(days=2))
        pool: Any = self.pool
        async with pool.acquire() as connection:
            overdue = await HoldStore(connection).list_expired(after="", row_max=1000)
        expiry = Expiry(pool, self.world.catalogue, self._outbox(clock), consumer="billing", clock=clock)
        await expiry.end(dict.fromkeys(overdue, Word.UNKNOWN))

    def _outbox(self, clock: ManualClock) -> Outbox:
        return Outbox(BillingSettings(), clock=clock, ids=SystemIds(clock))


def amount(step: Step) -> int:
    return (5 + 3 * int(step.which)) * USD


def correction(step: Step) -> Correction:
    return Correction(
        organization_id=step.organization,
        request_id=step.which,
        amount_nanos_usd=amount(step) // 100,
        reason="served slowly",
        resource="",
        invoice="",
        month=None,
    )


def event(step: Step) -> Message:
    if step.kind == "usage":
        return train(step.organization, step.number * 20, step.number * 20 + 20, step.which)
    if step.kind == "ended":
        return ended(step.organization, JOBS[step.which][1], JOBS[step.which][2], step.which)
    if step.number % 3 == 0:
        return hour(step.organization, step.number, hardware="cpu", usage_time=at(0))
    if step.number % 3 == 1:
        return minute(step.organization, step.number, hardware="nvidia-h200-141gb", devices=4)
    return served(step.organization, (f"gen-{step.number}", 10**6, 10**6))


def plan(chance: random.Random) -> list[Step]:
    """Lives of a few jobs, each in its order, and between them credit and what is served. Other callers have the same
    jobs, top-ups and calls in their plans: what one does second is a repetition."""
    lives = [
        [Step("top_up", chance.choice(ORGANIZATIONS), str(chance.randint(1, 6))) for _ in range(4)],
        [Step("served", chance.choice(ORGANIZATIONS), "", chance.randrange(12)) for _ in range(3)],
        [Step("credit_note", chance.choice(ORGANIZATIONS), str(chance.randint(1, 4))) for _ in range(2)],
        [Step("expire", chance.choice(ORGANIZATIONS), "")] if chance.random() < 0.1 else [],
        [Step("renew", chance.choice(ORGANIZATIONS), "") for _ in range(4)],
    ]
    for _ in range(JOBS_PER_CALLER):
        organization, job = chance.choice(ORGANIZATIONS), chance.choice(list(JOBS))
        ranges = chance.sample(range(3), k=chance.randint(0, 3))
        end = Step("release" if chance.random() < 0.2 else "ended", organization, job)
        lives.append([Step("hold", organization, job), *(Step("usage", organization, job, n) for n in ranges), end])
    steps = []
    while lives := [life for life in lives if life]:
        steps.append(chance.choice(lives).pop(0))
    return steps


@pytest.mark.parametrize("seed", range(5))
async def test_whatever_dies_and_whoever_is_first_the_money_adds_up(world: World, seed: int) -> None:
    chance = random.Random(seed)
    world.hold_ttl = OVERDUE
    callers = [
        Caller(world, FragilePool(world.pool, random.Random(chance.random()), crash_share=0.35)) for _ in range(CALLERS)
    ]
    await asyncio.gather(*(caller.run(plan(chance)) for caller in callers))
    heard = [each for caller in callers for each in caller.heard]
    for organization in ORGANIZATIONS:
        found = await insisting(partial(read, world.pool, organization))
        own = [each for each in heard if each.step.organization == organization]
        check_balances(found)
        check_answers(found, own)
        await check_settlements(world, found, own)
    numbers = {each.answer.number for each in heard if each.step.kind == "credit_note" and not each.refused}
    assert numbers == set(range(1, len(numbers) + 1))
    await check_by_verification(world)
    crashes = Counter({doom: sum(caller.pool.crashes[doom] for caller in callers) for doom in Doom})
    assert min(crashes.values()) > 0, crashes


async def check_by_verification(world: World) -> None:
    """What a customer would run finds nothing either."""
    verification = Verification(world.pool, None, batch_rows=100, timeout_s=60, names_scan_max=1000)
    async for _ in verification.run():
        pass
    assert verification.progress.difference is None, verification.progress
    assert verification.progress.transactions > 0


def check_balances(found: Read) -> None:
    books = found.books
    for account in ("prepaid", "held", "receivable", "revenue", "funding"):
        assert found.accounts.get(account, 0) == getattr(books, account), account
    assert {name: row["held_nanos_usd"] for name, row in found.holds.items() if row["state"] == "held"} == books.holds
    states = {"settled": "settlement", "released": "release", "expired": "release"}
    assert {name: states[row["state"]] for name, row in found.holds.items() if row["state"] != "held"} == books.ended
    assert {
        name: row["charged_nanos_usd"] for name, row in found.holds.items() if name in books.charged
    } == books.charged


def check_answers(found: Read, heard: list[Heard]) -> None:
    """What was acknowledged was there when it was heard, and is; what was refused was refused truly; and nothing is
    there that nobody asked for."""
    positions = {entry["id"]: entry["position"] for entry in found.entries}
    held = {entry["resource"]: entry["position"] for entry in of_kind(found.entries, "hold")}
    over = {entry["resource"]: entry["position"] for entry in of_kind(found.entries, "settlement", "release")}
    for each in heard:
        if each.refused:
            check_refusal(found, each)
        elif each.step.kind == "top_up":
            assert positions[each.answer] <= each.after
        elif each.step.kind == "hold":
            assert held[each.job] <= each.after
            assert over.get(each.job, each.before + 1) > each.before, "an ended hold was handed out as a new one"
        elif each.step.kind == "credit_note":
            assert positions[each.answer.transaction_id] <= each.after
        elif each.step.kind == "release" and each.answer:
            assert each.before < over[each.job] <= each.after
    acknowledged = {each.answer for each in heard if each.step.kind == "top_up"}
    assert {entry["id"] for entry in of_kind(found.entries, "top_up")} == acknowledged
    assert set(held) == set(found.holds)
    given = {each.job for each in heard if each.step.kind == "hold" and not each.refused}
    # Who lost the answer to its hold, and asks again when the job is over, hears that instead.
    too_late = {each.job for each in heard if each.step.kind == "hold" and each.refused} & set(over)
    assert given <= set(held) <= given | too_late
    released = {name for name, row in found.holds.items() if row["state"] == "released"}
    assert released <= {each.job for each in heard if each.step.kind == "release"}
    used = {each.step.number for each in heard if each.step.kind == "served"}
    assert len(of_kind(found.entries, "inference", "endpoint", "cluster")) == len(used)


def check_refusal(found: Read, each: Heard) -> None:
    refusal: DomainError = each.answer
    if refusal.reason == "BALANCE_INSUFFICIENT":
        free = int(refusal.metadata["available_nanos_usd"])
        assert free in found.books.available[each.before : each.after + 1], "that was not free while the caller asked"
        assert free < int(refusal.metadata["required_nanos_usd"])
    elif each.step.kind == "credit_note":
        earned = int(refusal.metadata["earned_nanos_usd"])
        assert earned in found.books.earned[each.before : each.after + 1], "that was not earned while the caller asked"
        assert earned < amount(each.step) // 100
    elif refusal.reason == "HOLD_EXPIRED":
        assert found.holds[each.job]["state"] == "expired"
    else:
        events = {"usage": "EVENT_INVALID", "ended": "EVENT_INVALID"}
        assert refusal.reason == {"hold": "STATE_CONFLICT", "release": "STATE_CONFLICT", **events}.get(each.step.kind)


async def check_settlements(world: World, found: Read, heard: list[Heard]) -> None:
    """Each charge follows from the records that are booked; a job that has all that it waits for is settled."""
    tokens: dict[str, list[int]] = defaultdict(list)
    query = "SELECT resource, quantity FROM usage_records WHERE kind = 'training_tokens'"
    for row in await insisting(lambda: world.pool.fetch(query)):
        tokens[row["resource"]].append(row["quantity"])
    told: set[str] = set()
    used: dict[str, set[int]] = defaultdict(set)
    for each in heard:
        if each.step.kind == "ended" and not each.refused:
            told.add(each.job)
        elif each.step.kind == "usage" and not each.refused:
            used[each.job].add(each.step.number)
    assert {job: len(numbers) for job, numbers in used.items()} == {
        job: len(booked) for job, booked in tokens.items() if job in found.holds
    }
    for job, row in found.holds.items():
        work, name, count = JOBS[job.rpartition("/")[2]]
        ending = Ending(name.lower())
        complete = job in told and (len(tokens[job]) >= count or not settlement.needs_all_usage(ending))
        assert not (complete and row["state"] == "held"), f"{job} has all that it waits for and is not settled"
        book = world.catalogue.version(row["price_book_version"])
        rate = book.tuning_rate(work.base_model, work.method, 0)
        assert row["held_nanos_usd"] == quote(book.tuning_rule, rate, work).total_nanos_usd
        if row["state"] == "settled":
            assert job in told
            due = settlement.settle(
                ending=ending,
                held_nanos_usd=row["held_nanos_usd"],
                rule=book.tuning_rule,
                nanos_usd_per_million=rate,
                work=work,
                metered=Metered(training_tokens=sum(tokens[job])),
            )
            assert row["charged_nanos_usd"] == due.charge_nanos_usd
