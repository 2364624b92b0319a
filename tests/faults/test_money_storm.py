"""A storm of usage on the real JetStream while billing, NATS and PostgreSQL are killed one after the other.

Everything comes at least twice and in no order, some of it cannot be true. When it is quiet again, each piece of work
is booked once, each impossible one is a dead letter with its reason, and the ledger verifies. Slow (three processes die
and start again), because only real ones lose what they had in hand.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from operator import le
from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg
import nats
import pytest_asyncio
from nats.errors import Error as NatsError
from nats.js import JetStreamContext

from chassis import pki
from chassis.identity import Caller, acting_as
from chassis.rpc.channel import open_channel
from chassis.settings import ChassisSettings
from deploy.local.stack import Stack, StackOptions
from deploy.local.table import SERVICES
from finemesh.billing.v1 import ledger_service_pb2 as ledger_pb
from finemesh.billing.v1.billing_service_pb2 import EstimatePriceRequest, TopUpRequest
from finemesh.billing.v1.billing_service_pb2_grpc import BillingServiceStub
from finemesh.billing.v1.ledger_service_pb2_grpc import LedgerServiceStub
from finemesh.holds.v1.hold_service_pb2 import CreateHoldRequest
from finemesh.holds.v1.hold_service_pb2_grpc import HoldServiceStub
from finemesh_client.accounting.journal import ACCOUNTS, Recomputed, recompute
from tests.faults.storm import JOBS, ORGANIZATIONS, UNHELD, Event, job_name, make_storm
from tests.harness.polling import eventually

if TYPE_CHECKING:
    from finemesh.billing.v1.billing_service_pb2_grpc import BillingServiceAsyncStub
    from finemesh.billing.v1.ledger_service_pb2_grpc import LedgerServiceAsyncStub
    from finemesh.holds.v1.hold_service_pb2_grpc import HoldServiceAsyncStub

SEED = 20_262
CREDIT_NANOS_USD = 1000 * 10**9
QUIET_TIMEOUT_S = 180
# Short, so that what a dead process had in hand comes again within the test.
QUICK = {
    "FINEMESH_CONSUMER_ACK_WAIT_S": "3",
    "FINEMESH_CONSUMER_FAILURES_MAX": "3",
    "FINEMESH_CONSUMER_BACKOFF_S_MIN": "0.05",
    "FINEMESH_BILLING_VERIFY_PROGRESS_S": "0",
}
PUBLISHERS = 16
VICTIMS = ("billing", "nats", "postgres")


@dataclass(frozen=True, kw_only=True)
class Town:
    """Billing with its NATS and PostgreSQL, and its callers."""

    stack: Stack
    billing: BillingServiceAsyncStub
    holds: HoldServiceAsyncStub
    ledger: LedgerServiceAsyncStub

    async def rows(self, statement: str, *values: object) -> list[asyncpg.Record]:
        url = self.stack.environment("billing")["FINEMESH_BILLING_DATABASE_URL"]
        connection = await asyncpg.connect(url)
        try:
            return list(await connection.fetch(statement, *values))
        finally:
            await connection.close()

    async def value(self, statement: str) -> int:
        return int((await self.rows(statement))[0][0])

    async def verified(self) -> ledger_pb.VerifyLedgerResponse:
        with acting_as(operator(ORGANIZATIONS[0])):
            request = ledger_pb.VerifyLedgerRequest(organization="organizations/-")
            return [answer async for answer in self.ledger.VerifyLedger(request)][-1]


def operator(organization: str) -> Caller:
    roles = frozenset({"admin", "operator"})
    return Caller(service="gateway", tenant=f"{organization}-p", account=organization, roles=roles)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def town(tmp_path_factory) -> AsyncIterator[Town]:
    data: Path = tmp_path_factory.mktemp("storm")
    billing_alone = tuple(service for service in SERVICES if service.name == "billing")
    async with Stack(StackOptions(data=data, services=billing_alone, environment=QUICK)) as stack:
        channels = {}
        for name in ("gateway", "scheduler"):
            pki.issue(stack.folder.tls, name)
            settings = ChassisSettings(service_name=name, tls_dir=stack.folder.tls)
            channels[name] = open_channel(settings, stack.addresses["billing"], "billing")
        yield Town(
            stack=stack,
            billing=BillingServiceStub(channels["gateway"]),
            holds=HoldServiceStub(channels["scheduler"]),
            ledger=LedgerServiceStub(channels["gateway"]),
        )
        for channel in channels.values():
            await channel.close()


async def hold(town: Town, organization: str, number: int) -> None:
    price = EstimatePriceRequest(
        base_model="finemesh/demo-llama", training_tokens=1000, epochs=2, validation_tokens=100, evaluations=1
    )
    await town.holds.CreateHold(
        CreateHoldRequest(
            resource=job_name(organization, number),
            organization_id=organization,
            project_id=f"{organization}-p",
            price=price,
        )
    )


@asynccontextmanager
async def jetstream(town: Town) -> AsyncIterator[JetStreamContext]:
    url = town.stack.bus_url
    client = await nats.connect(url, max_reconnect_attempts=-1, reconnect_time_wait=0.1, error_cb=_ignore)
    try:
        yield client.jetstream(timeout=2)
    finally:
        await client.close()


async def _ignore(error: Exception) -> None:
    """The bus is killed on purpose."""


async def publish(js: JetStreamContext, events: Sequence[Event]) -> None:
    """Each until the bus has it, as an outbox does: a publish whose answer was lost is one more duplicate."""
    waiting = list(reversed(events))

    async def worker() -> None:
        while waiting:
            event = waiting.pop()
            while True:
                try:
                    await js.publish(event.subject, event.payload, headers=event.headers)
                    break
                except (NatsError, OSError, TimeoutError):
                    # As a publisher backs off while the bus is away.
                    await asyncio.sleep(0.05)

    await asyncio.gather(*(worker() for _ in range(PUBLISHERS)))


async def storm_and_kill(town: Town, js: JetStreamContext, events: Sequence[Event], victims: Sequence[str]) -> None:
    """Kills one process after the other while events are being handled. Each kill lets another part of the storm loose,
    so that it is never over before the last one, however fast it is handled."""
    first, *others = (events[place :: len(victims) + 1] for place in range(len(victims) + 1))
    handled, known = 0, {event.id for event in first}
    async with asyncio.TaskGroup() as storming:
        storming.create_task(publish(js, first))
        for victim, part in zip(victims, others, strict=True):
            handled = (handled + len(known)) // 2
            await eventually(
                lambda: town.value("SELECT count(*) FROM inbox"),
                partial(le, handled),
                within_s=QUIET_TIMEOUT_S,
                pause_s=0.02,
            )
            await town.stack.kill(victim)
            known |= {event.id for event in part}
            storming.create_task(publish(js, part))
            await town.stack.wait_healthy(victim)
    await town.stack.wait_healthy()


async def quiet(town: Town, js: JetStreamContext) -> None:
    """All that was published is booked or set aside, all that billing announces is published.

    The archive files its events when it has gathered enough, and readers of services that do not run here never come.
    """
    async with asyncio.timeout(QUIET_TIMEOUT_S):
        while True:
            readers = [
                reader
                for stream in await js.streams_info()
                for reader in await js.consumers_info(str(stream.config.name))
                if reader.name == "billing"
            ]
            waiting = sum((reader.num_pending or 0) + (reader.num_ack_pending or 0) for reader in readers)
            unpublished = await town.value("SELECT count(*) FROM outbox WHERE published_at IS NULL")
            if readers and not waiting and not unpublished:
                return
            # Neither a bus nor an outbox tells that it is empty.
            await asyncio.sleep(0.1)


async def test_a_storm_of_usage_survives_every_kill_and_verifies(town: Town) -> None:
    for organization in ORGANIZATIONS:
        with acting_as(operator(organization)):
            await town.billing.TopUp(TopUpRequest(amount_nanos_usd=CREDIT_NANOS_USD, request_id="storm"))
        for number in range(JOBS):
            await hold(town, organization, number)
    storm = make_storm()
    # Every event twice; every tenth piece of work once more under another id.
    copies = [*storm.events, *storm.events, *(event.again(1) for event in storm.events[::10])]
    random.Random(SEED).shuffle(copies)
    async with jetstream(town) as js:
        await storm_and_kill(town, js, copies, VICTIMS)
        await quiet(town, js)
        dead = (await js.stream_info("DEADLETTER")).state.messages
    assert [town.stack.restarts(name) for name in VICTIMS] == [1, 1, 1]

    booked = await town.rows("SELECT project_id, work_key, quantity FROM usage_records")
    assert {(row["project_id"], row["work_key"]): row["quantity"] for row in booked} == storm.booked
    holds = await town.rows("SELECT state, held_nanos_usd, charged_nanos_usd, discrepancy FROM holds")
    assert len(holds) == len(ORGANIZATIONS) * JOBS
    assert {tuple(row) for row in holds} == {("settled", 5 * 10**9, 5 * 10**9, "")}

    letters = {row["event_id"]: row for row in await town.rows("SELECT event_id, error, headers FROM dead_letters")}
    impossible = {event.id: event for event in copies if event.why}
    parts = {row["event_id"] for row in letters.values() if "ce-partof" in row["headers"]}
    whole = {event_id for event_id, event in impossible.items() if "calls" not in event.why}
    assert set(letters) - parts == whole
    for event_id in whole:
        assert impossible[event_id].why in letters[event_id]["error"]
    assert len(parts) == len(impossible) - len(whole)
    assert all("2 of 3 calls" in letters[event_id]["error"] for event_id in parts)
    announced = await town.value("SELECT count(*) FROM outbox WHERE subject = 'deadletter.event_set_aside'")
    assert dead >= announced == len(letters)

    outcome = await town.verified()
    assert outcome.done
    assert not outcome.HasField("difference"), outcome.difference
    assert outcome.usage_record_count == len(storm.booked)
    assert outcome.hold_count == len(holds)
    await the_journal_agrees(town)
    await what_waited_for_its_hold_is_booked(town)


async def the_journal_agrees(town: Town) -> None:
    """A customer recomputes it, from the first entry to the balance."""
    for organization in ORGANIZATIONS:
        with acting_as(operator(organization)):
            parts = [part async for part in town.ledger.ExportJournal(ledger_pb.ExportJournalRequest())]
        sums = Recomputed()
        assert recompute((entry for part in parts for entry in part.entries), sums) is None
        balances = await town.rows(
            "SELECT account, balance_nanos_usd FROM accounts WHERE organization_id = $1", organization
        )
        assert {account: sums.balances.get(account, 0) for account in ACCOUNTS} == dict(map(tuple, balances))


async def what_waited_for_its_hold_is_booked(town: Town) -> None:
    """The cause of a dead letter is gone, somebody runs it again, and the ledger still verifies."""
    organization = ORGANIZATIONS[0]
    (letter, *_) = await town.rows(
        "SELECT event_id FROM dead_letters WHERE error LIKE $1", f"%{job_name(organization, UNHELD)} has no hold%"
    )
    await hold(town, organization, UNHELD)
    with acting_as(operator(organization)):
        request = ledger_pb.ReplayDeadLetterRequest(event_id=str(letter["event_id"]))
        assert (await town.ledger.ReplayDeadLetter(request)).booked
    assert not (await town.verified()).HasField("difference")
