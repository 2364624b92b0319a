"""What the scheduler's store tests work with: its stores on a scratch database, and short words for common moves."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from google.protobuf.message import Message

from chassis.bus.outbox import Outbox
from chassis.clock import ManualClock
from chassis.db.migrations import migrate
from chassis.db.pool import Connection, Pool, open_pool
from chassis.ids import SeededIds
from finemesh.artifacts.v1 import artifact_pb2
from finemesh.events.v1 import tuning_events_pb2, usage_events_pb2
from finemesh.tuning.v1 import tuning_job_pb2
from services.scheduler.attempts.attempt import ExportedModel, NewCheckpoint, Usage
from services.scheduler.attempts.attempts import Attempts
from services.scheduler.attempts.progress import Metric
from services.scheduler.attempts.reports import AttemptReports
from services.scheduler.config import SchedulerSettings
from services.scheduler.database import MIGRATIONS, Database
from services.scheduler.jobs.convert import job_name
from services.scheduler.jobs.job import Job, JobRef, LeaseRef, NewJob
from services.scheduler.jobs.lifecycle import JobTransition
from services.scheduler.jobs.store import JobStore
from services.scheduler.jobs.transitions import JobTransitions
from services.scheduler.nodes.node import DeviceFacts, NodeRegistration
from services.scheduler.nodes.registry import NodeRegistry
from services.scheduler.nodes.store import NodeStore
from services.scheduler.pipelines.lease_sweeper import Sweeper
from services.scheduler.pipelines.placer import Placer
from services.scheduler.placement import policy
from services.scheduler.placement.store import AllocationStore
from services.scheduler.watching.hub import Hub
from services.scheduler.watching.store import notify

PROJECT = "proj_a"
# Of a renewal of leases.
LIMITS = {"duration_s": 10.0, "progress_s_max": 3600.0}
EVENTS: dict[str, type[Message]] = {
    "tuning.job.state_changed": tuning_events_pb2.TuningJobStateChanged,
    "tuning.job.ended": tuning_events_pb2.TuningJobEnded,
    "usage.training.recorded": usage_events_pb2.TrainingUsageRecorded,
}


def artifact(key: str, sha256: str = "00") -> bytes:
    files = [artifact_pb2.ArtifactFile(path="a", size_bytes=3, sha256=sha256)]
    return artifact_pb2.Artifact(key=key, files=files).SerializeToString(deterministic=True)


def metric(step: int, *, validation_loss: float | None = None) -> Metric:
    message = tuning_job_pb2.TuningProgress(step=step, step_count=100, training_loss=2.0)
    if validation_loss is not None:
        message.validation_loss = validation_loss
    return Metric(
        step=step,
        step_count=100,
        training_loss=2.0,
        validation_loss=validation_loss,
        remaining_s=5.0,
        encoded=message.SerializeToString(deterministic=True),
    )


def train(start: int, end: int, tokens: int = 100) -> Usage:
    return Usage(kind="train", start_step=start, end_step=end, tokens=tokens)


def checkpoint(step: int, token: int = 0) -> NewCheckpoint:
    return NewCheckpoint(
        step=step, manifest_sha256=f"sha-{step}", size_bytes=3, artifact=artifact(f"checkpoints/{step}-{token}/")
    )


def model(revision: str = "rv_1") -> ExportedModel:
    return ExportedModel(
        revision=revision, kind="adapter", adapter_rank=16, lineage={"parity": "ok"}, artifact=artifact("models/x/")
    )


class SteppedClock(ManualClock):
    """A manual clock whose wall time can be set, as NTP or a person does; the monotonic one does not notice."""

    stepped_s = 0.0

    def now(self) -> datetime:
        return super().now() + timedelta(seconds=self.stepped_s)


@dataclass(kw_only=True)
class World:
    settings: SchedulerSettings
    clock: SteppedClock
    database: Database
    jobs: JobTransitions
    nodes: NodeRegistry
    reports: AttemptReports
    attempts: Attempts
    placer: Placer
    sweeper: Sweeper
    ids: SeededIds
    hub: Hub

    @property
    def pool(self) -> Pool:
        return self.database.pool

    async def add_node(
        self, node: str = "n1", devices: int = 1, incarnation: str = "i1", *, listens: bool = True
    ) -> None:
        registration = NodeRegistration(
            node=node,
            incarnation=incarnation,
            address="127.0.0.1:1",
            agent_version="1",
            devices=tuple(
                DeviceFacts(index=index, hardware_type="cpu", memory_bytes=0, uuid="") for index in range(devices)
            ),
        )
        await self.nodes.register(registration)
        if listens:
            await NodeStore(self.pool).open_heartbeat(node, incarnation, self.ids.uuid())

    async def new_job(self, gpu_count: int = 1, project: str = PROJECT, **values: Any) -> JobRef:
        async with self.database.writing() as connection:
            return await self._create(connection, gpu_count, project, values)

    async def _create(self, connection: Connection, gpu_count: int, project: str, values: dict[str, Any]) -> JobRef:
        job_id = self.ids.new("ft")
        given: dict[str, Any] = {
            "project_id": project,
            "job_id": job_id,
            "organization_id": "org_a",
            "api_key_id": "key_a",
            "namespace": "team",
            "request_id": None,
            "request_sha256": "digest",
            "spec": tuning_job_pb2.TuningSpec(base_model="finemesh/demo-llama").SerializeToString(),
            "base_model": "finemesh/demo-llama",
            "base_revision": "rv_base",
            "parameter_count": 1000,
            "output_name": f"out-{job_id}",
            "gpu_count": gpu_count,
            "memory_bytes_min": 0,
            "base_artifact": artifact("base/"),
            "training_artifact": artifact("files/t"),
            "validation_artifact": None,
        }
        await self.jobs.create(connection, NewJob(**(given | values)))
        return JobRef(project_id=project, job_id=job_id)

    async def queued_job(self, gpu_count: int = 1, project: str = PROJECT, **values: Any) -> JobRef:
        """In one transaction: a scheduler that runs would claim the job in between."""
        claim = self.ids.uuid()
        async with self.database.writing() as connection:
            ref = await self._create(connection, gpu_count, project, values)
            await connection.execute("UPDATE jobs SET claim_token = $1 WHERE job_id = $2", claim, ref.job_id)
            change = await self.jobs.transition(
                connection,
                JobTransition.HELD,
                ref,
                "held",
                claim=claim,
                counts=b"",
                quoted_nanos_usd=5_000_000_000,
                price_book_version="default",
                hold_id="hold_1",
            )
        assert change is not None
        return ref

    async def placed_job(self, **values: Any) -> LeaseRef:
        """A job that the placer gave a lease; needs a free node."""
        ref = await self.queued_job(**values)
        await self.placer.place_round()
        return await self.lease_of(ref)

    async def running_job(self, **values: Any) -> LeaseRef:
        lease = await self.placed_job(**values)
        await self.reports.start(lease)
        return lease

    async def lease_of(self, ref: JobRef) -> LeaseRef:
        token = await self.pool.fetchval("SELECT lease_token FROM jobs WHERE job_id = $1", ref.job_id)
        assert token is not None
        return LeaseRef(project_id=ref.project_id, job_id=ref.job_id, lease_token=token)

    async def job(self, ref: JobRef) -> Job:
        job = await JobStore(self.pool).get(ref)
        assert job is not None
        return job

    async def lose(self, lease: LeaseRef) -> bool:
        """Ends the lease as the sweeper does when its time is over."""
        await self.pool.execute("UPDATE allocations SET expires_at = now() WHERE lease_token = $1", lease.lease_token)
        async with self.database.writing() as connection:
            at = await AllocationStore(connection).time()
            return await self.attempts.lose(connection, lease, "the node was lost", at=at)

    async def place_again(self, ref: JobRef) -> LeaseRef:
        """The next attempt at a job that was requeued, started."""
        await self.pool.execute("UPDATE jobs SET wake_at = now()")
        await self.pool.execute("UPDATE nodes SET seen_at = now()")
        await self.placer.place_round()
        lease = await self.lease_of(ref)
        await self.reports.start(lease)
        return lease

    async def events(self, subject: str, ref: JobRef) -> list[Any]:
        """The outbox's events of one subject about one job."""
        rows = await self.pool.fetch(
            "SELECT payload FROM outbox WHERE subject = $1 AND headers ->> 'ce-subject' = $2 ORDER BY created_at",
            subject,
            job_name(ref),
        )
        return [EVENTS[subject].FromString(row["payload"]) for row in rows]

    async def everything(self) -> dict[str, list[tuple[object, ...]]]:
        """All rows of all tables, to prove that something changed nothing."""
        tables = await self.pool.fetch(
            "SELECT tablename FROM pg_tables WHERE schemaname = current_schema() ORDER BY tablename"
        )
        found: dict[str, list[tuple[object, ...]]] = {}
        for (table,) in tables:
            rows = await self.pool.fetch(f"SELECT * FROM {table}")  # noqa: S608 - names come from the catalogue
            found[table] = sorted(tuple(map(repr, row.values())) for row in rows)
        return found


def placement(ref: JobRef, node: str = "n1", devices: tuple[int, ...] = (0,)) -> policy.Placement:
    return policy.Placement(owner=job_name(ref), node=node, hardware_type="cpu", device_indices=devices)


async def migrated_pool(settings: SchedulerSettings) -> Pool:
    pool = await open_pool(settings)
    await migrate(pool, [MIGRATIONS])
    return pool


async def fresh_world(pool: Pool, settings: SchedulerSettings) -> World:
    """An empty database, as it is after the migrations."""
    tables = await pool.fetch(
        "SELECT tablename FROM pg_tables WHERE schemaname = current_schema() AND tablename <> 'schema_migrations'"
    )
    await pool.execute(f"TRUNCATE {', '.join(row['tablename'] for row in tables)}")
    clock, ids = SteppedClock(), SeededIds(7)
    hub = Hub()
    database = Database(pool, Outbox(settings, clock=clock, ids=ids), clock, hub.notify, notify)
    jobs = JobTransitions(database)
    attempts = Attempts(database, jobs, settings)
    nodes = NodeRegistry(database, attempts, nodes_max=settings.nodes_max)
    return World(
        settings=settings,
        clock=clock,
        database=database,
        jobs=jobs,
        nodes=nodes,
        reports=AttemptReports(database, jobs, settings),
        attempts=attempts,
        placer=Placer(database, jobs, hub, clock, settings),
        sweeper=Sweeper(database, nodes, attempts, clock, settings),
        ids=ids,
        hub=hub,
    )
