"""QUEUED -> STARTING: asks the policy who gets which devices and writes each placement in a transaction of its own.

Two schedulers may run it at once: the database refuses the second owner of a device, and the slower placement is dropped.
"""

from collections.abc import Mapping
from datetime import timedelta

import asyncpg
import structlog

from chassis.clock import Clock
from services.scheduler import lease_store, leases, policy
from services.scheduler.config import SchedulerSettings
from services.scheduler.domain import AllocationKind, JobRef, LeaseRef
from services.scheduler.job_store import JobStore, resource_name
from services.scheduler.lifecycle import JobTransition
from services.scheduler.node_store import load_fleet
from services.scheduler.rounds import run_rounds
from services.scheduler.store import QUERIES, QUEUE_TOPIC, Store, node_topic, notify
from services.scheduler.watch import Hub

log = structlog.get_logger(__name__)


class Overtaken(Exception):
    """The snapshot is old: the job or the node changed meanwhile."""


class Placer:
    def __init__(self, store: Store, jobs: JobStore, hub: Hub, clock: Clock, settings: SchedulerSettings) -> None:
        self._store = store
        self._jobs = jobs
        self._hub = hub
        self._clock = clock
        self._settings = settings

    async def run(self) -> None:
        with self._hub.listening(QUEUE_TOPIC) as bell:
            await run_rounds("placer", self.place_round, lambda: bell.wait(self._settings.pipeline_poll_s), self._clock)

    async def place_round(self) -> bool:
        """One look at the queue and the fleet; True when something was placed, so that another look pays."""
        now = self._store.now()
        queue: dict[str, JobRef] = {}
        needs = []
        rows = QUERIES.list_queued(self._store.pool, now=now, page_size=self._settings.placements_batch_max)
        async for row in rows:
            ref = JobRef(project_id=row["project_id"], job_id=row["job_id"])
            owner = resource_name(ref)
            queue[owner] = ref
            needs.append(
                policy.Need(
                    owner=owner,
                    count=row["gpu_count"],
                    memory_bytes_min=row["memory_bytes_min"],
                    nodes_max=policy.GANG_NODES_MAX,
                )
            )
        if not needs:
            return False
        seen_since = now - timedelta(seconds=self._settings.node_memory_s)
        fleet = await load_fleet(self._store.pool, seen_since, self._settings.nodes_max)
        placed = 0
        for placement in policy.place(needs, fleet.groups):
            try:
                await self.apply(queue[placement.owner], placement, fleet.incarnations)
                placed += 1
            except (Overtaken, asyncpg.UniqueViolationError) as error:
                log.info("placement overtaken", job=placement.owner, node=placement.node, error=repr(error))
        return placed > 0

    async def apply(self, ref: JobRef, placement: policy.Placement, incarnations: Mapping[str, str]) -> int:
        """Leases, devices, attempt and transition in one transaction; returns the fencing token, which is the leading node's."""
        parts = (placement, *placement.followers)
        async with self._store.writing() as connection:
            # In one order, so that two placements never wait for each other.
            for node in sorted(part.node for part in parts):
                if not await lease_store.guard_node(connection, node, incarnations[node]):
                    raise Overtaken
            token = await lease_store.next_lease_token(connection)
            message = "placed on " + " and ".join(_in_words(part) for part in parts)
            change = await self._jobs.transition(connection, JobTransition.PLACE, ref, message, lease_token=token)
            if change is None:
                raise Overtaken
            now = self._store.now()
            lease = LeaseRef(project_id=ref.project_id, job_id=ref.job_id, lease_token=token)
            expires_at = leases.expiry(now, self._settings.lease_duration_s)
            incarnation = incarnations[placement.node]
            await lease_store.insert_allocation(
                connection, token, AllocationKind.TRAINING, placement, incarnation, now, expires_at
            )
            await lease_store.insert_attempt(connection, lease, change.attempt_count, placement.node, incarnation, now)
            for part in placement.followers:
                await lease_store.insert_allocation(
                    connection,
                    await lease_store.next_lease_token(connection),
                    AllocationKind.TRAINING,
                    part,
                    incarnations[part.node],
                    now,
                    expires_at,
                    leader_token=token,
                )
            await notify(connection, *(node_topic(part.node) for part in parts))
        return token


def _in_words(part: policy.Placement) -> str:
    devices = ", ".join(str(index) for index in part.device_indices)
    return f"{part.node}, {part.hardware_type} {devices}"
