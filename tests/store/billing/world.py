"""What billing's store tests work with: a migrated database, the real price books, a clock that stands, and events."""

import asyncio
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from chassis.bus.envelope import EventInfo
from chassis.bus.outbox import Outbox
from chassis.bus.subjects import subject_of
from chassis.clock import ManualClock
from chassis.db.pool import Connection, Pool, transaction
from chassis.ids import SeededIds
from finemesh.events.v1 import tuning_events_pb2, usage_events_pb2
from services.billing.config import BillingSettings
from services.billing.events import DURABLE, Events
from services.billing.holds import holding
from services.billing.holds.expiry import Expiry
from services.billing.holds.hold import Hold
from services.billing.ledger.store import LedgerStore
from services.billing.ledger.top_up import add_credit
from services.billing.limits import FactLimits, Limits
from services.billing.prices.catalogue import Catalogue
from services.billing.prices.pricing import Work

NOW = datetime(2026, 11, 23, 5, 0, tzinfo=UTC)
USD = 10**9

# 100 training steps of 1000 tokens in each of 2 epochs, and 3 evaluations of 5000 tokens in each: at the default
# book's 6.10 dollars per million that is below its minimum of 5 dollars.
SMALL = Work(
    base_model="meta-llama/Llama-3.1-8B",
    method="sft_lora",
    training_tokens=100_000,
    validation_tokens=5_000,
    epochs=2,
    evaluations=3,
)
# The same in large: 12.20 dollars to train and 1.83 to evaluate.
LARGE = Work(
    base_model="meta-llama/Llama-3.1-8B",
    method="sft_lora",
    training_tokens=1_000_000,
    validation_tokens=50_000,
    epochs=2,
    evaluations=3,
)


MessageT = TypeVar("MessageT", bound=Message)


@dataclass(kw_only=True)
class World:
    pool: Pool
    catalogue: Catalogue
    clock: ManualClock = field(default_factory=lambda: ManualClock(NOW))
    hold_ttl: timedelta = timedelta(days=1)
    # One for the whole test: another one would give the same ids again.
    outbox: Outbox = field(init=False)

    def __post_init__(self) -> None:
        self.outbox = Outbox(BillingSettings(), clock=self.clock, ids=SeededIds(1, self.clock))

    async def pass_time(self, time: timedelta) -> None:
        """For the process, and for the database, in whose time holds last."""
        self.clock.jump(time.total_seconds())
        await self.pool.execute("UPDATE holds SET expire_time = expire_time - $1::interval WHERE state = 'held'", time)

    async def top_up(self, organization: str, amount: int, request_id: str = "first") -> uuid.UUID:
        async with transaction(self.pool) as connection:
            return await self.top_up_on(connection, organization, amount, request_id)

    async def top_up_on(self, connection: Connection, organization: str, amount: int, request_id: str) -> uuid.UUID:
        transaction_id, _ = await add_credit(
            connection,
            organization_id=organization,
            amount_nanos_usd=amount,
            request_id=request_id,
            now=self.clock.now(),
            limits=Limits(),
        )
        return transaction_id

    async def hold(self, organization: str, job: str = "ft-1", work: Work = SMALL, api_key_id: str = "") -> Hold:
        async with transaction(self.pool) as connection:
            return await self.hold_on(connection, organization, job, work, api_key_id)

    async def hold_on(
        self, connection: Connection, organization: str, job: str, work: Work, api_key_id: str = ""
    ) -> Hold:
        return await holding.create_hold(
            connection,
            self.catalogue.at(self.clock.now()),
            resource=resource(organization, job),
            organization_id=organization,
            project_id=f"{organization}-p",
            work=work,
            now=self.clock.now(),
            limits=Limits(),
            ttl=self.hold_ttl,
            late_usage=timedelta(days=1),
            api_key_id=api_key_id,
        )

    async def release(self, organization: str, job: str = "ft-1") -> int:
        async with transaction(self.pool) as connection:
            return await self.release_on(connection, organization, job)

    async def release_on(self, connection: Connection, organization: str, job: str) -> int:
        released = await holding.release_hold(connection, resource=resource(organization, job), now=self.clock.now())
        return released.held_nanos_usd if released else 0

    def expiry(self) -> Expiry:
        return Expiry(self.pool, self.catalogue, self.outbox, consumer=DURABLE, clock=self.clock)

    async def deliver(self, *messages: Message) -> None:
        """Runs the handlers as the consumer does, without its memory of handled events: the harder case."""
        for message in messages:
            async with transaction(self.pool) as connection:
                await self.handle(connection, message)

    async def handle(self, connection: Connection, message: Message) -> None:
        handlers = Events(self.catalogue, FactLimits(), self.outbox, clock=self.clock).handlers
        info = EventInfo(
            id=uuid.uuid4(), type=message.DESCRIPTOR.full_name, source="test", subject="", time=NOW, deliveries=1
        )
        await handlers[type(message)](connection, message, info)

    async def events(self, kind: type[MessageT]) -> list[MessageT]:
        """What was announced of this kind, oldest first."""
        rows = await self.pool.fetch(
            "SELECT payload FROM outbox WHERE subject = $1 ORDER BY created_at, id", subject_of(kind)
        )
        return [kind.FromString(row["payload"]) for row in rows]

    async def balances(self, organization: str) -> dict[str, int]:
        rows = await self.pool.fetch(
            "SELECT account, balance_nanos_usd FROM accounts WHERE organization_id = $1", organization
        )
        return {row["account"]: row["balance_nanos_usd"] for row in rows}

    async def hold_row(self, organization: str, job: str = "ft-1") -> Any:
        return await self.pool.fetchrow("SELECT * FROM holds WHERE resource = $1", resource(organization, job))

    async def dump(self) -> list[str]:
        """Everything that billing knows, but for how long holds last, and for the order of booking: that is `chain`."""
        lines: list[str] = []
        for table in ("accounts", "holds", "job_endings", "usage_records", "usage_sums"):
            query = f"SELECT (to_jsonb(t) - 'expire_time')::text AS line FROM {table} AS t ORDER BY 1"  # noqa: S608
            rows = await self.pool.fetch(query)
            lines += [f"{table} {row['line']}" for row in rows]
        async with self.pool.acquire() as connection:
            return lines + [repr(row) async for row in LedgerStore(connection).dump()]

    async def chain(self) -> list[str]:
        """The ledger in the order of booking, with its hashes."""
        rows = await self.pool.fetch("SELECT to_jsonb(t)::text AS line FROM transactions AS t ORDER BY 1")
        return [row["line"] for row in rows]


async def waiting(world: World) -> None:
    """Returns once a statement of this database waits for a lock."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    async with asyncio.timeout(30):
        while not await world.pool.fetchval(query):
            pass


def resource(organization: str, job: str = "ft-1") -> str:
    return f"projects/{organization}-p/tuningJobs/{job}"


def at(minutes: float) -> Timestamp:
    value = Timestamp()
    value.FromDatetime(NOW + timedelta(minutes=minutes))
    return value


def train(organization: str, start: int, end: int, job: str = "ft-1", tokens_per_step: int = 1000) -> Message:
    return usage_events_pb2.TrainingUsageRecorded(
        work_key=f"{job}:train:{start}-{end}",
        tuning_job=resource(organization, job),
        project_id=f"{organization}-p",
        organization_id=organization,
        kind="train",
        start_step=start,
        end_step=end,
        tokens=(end - start) * tokens_per_step,
        usage_time=at(end / 10),
    )


def evaluate(organization: str, number: int, job: str = "ft-1", tokens: int = 5000) -> Message:
    return usage_events_pb2.TrainingUsageRecorded(
        work_key=f"{job}:evaluate:{number}",
        tuning_job=resource(organization, job),
        project_id=f"{organization}-p",
        organization_id=organization,
        kind="evaluate",
        start_step=number,
        end_step=number,
        tokens=tokens,
        usage_time=at(number),
    )


def ended(organization: str, ending: str, count: int, job: str = "ft-1") -> Message:
    return tuning_events_pb2.TuningJobEnded(
        tuning_job=resource(organization, job),
        project_id=f"{organization}-p",
        organization_id=organization,
        ending=tuning_events_pb2.TuningJobEnding.Value(f"TUNING_JOB_ENDING_{ending}"),
        usage_record_count=count,
        end_time=at(30),
    )


def whole_run(organization: str, job: str = "ft-1") -> list[Message]:
    """All usage of the SMALL work: 200 steps and 6 evaluations, 16 records."""
    steps = [train(organization, start, start + 20, job) for start in range(0, 200, 20)]
    return steps + [evaluate(organization, number, job) for number in range(1, 7)]


def served(
    organization: str, *calls: tuple[str, int, int], model: str = "acme/bot"
) -> usage_events_pb2.InferenceUsageRecorded:
    """Calls as (generation id, input tokens, output tokens)."""
    return usage_events_pb2.InferenceUsageRecorded(
        records=[
            usage_events_pb2.InferenceUsage(
                work_key=key,
                project_id=f"{organization}-p",
                organization_id=organization,
                model_id=model,
                base_model="finemesh/demo-llama",
                input_tokens=input_tokens,
                output_tokens=output_tokens,
                usage_time=at(1),
            )
            for key, input_tokens, output_tokens in calls
        ]
    )


def minute(organization: str, number: int, hardware: str = "cpu", devices: int = 1) -> Message:
    return usage_events_pb2.EndpointMinuteRecorded(
        work_key=f"ep_1:7:{number}",
        endpoint=f"projects/{organization}-p/endpoints/ep_1",
        project_id=f"{organization}-p",
        organization_id=organization,
        hardware_type=hardware,
        device_count=devices,
        minute=number,
        usage_time=at(number),
    )


def hour(
    organization: str, number: int, hardware: str = "nvidia-h100-80gb", nodes: int = 2, **changes: object
) -> Message:
    message = usage_events_pb2.ClusterHourRecorded(
        work_key=f"cl_1:3:{number}",
        cluster=f"projects/{organization}-p/clusters/cl_1",
        project_id=f"{organization}-p",
        organization_id=organization,
        hardware_type=hardware,
        node_count=nodes,
        hour=number,
        usage_time=at(number * 60),
    )
    for name, value in changes.items():
        if name == "usage_time":
            message.usage_time.CopyFrom(value)  # type: ignore[arg-type]
        else:
            setattr(message, name, value)
    return message
