"""Not pure: database, outbox. QUEUED -> STARTING: asks the policy who gets which devices, and applies each placement.

Each placement is a transaction of its own. Two schedulers may run it at once: the database refuses the second owner of
a device, and the slower placement is dropped. A job that can never be placed, because of a defect, fails in the end.
"""

from collections.abc import Mapping, Sequence

import asyncpg
import structlog

from chassis.clock import Clock
from chassis.db.pool import database_is_away
from chassis.rounds import FailingItems, run_rounds
from services.scheduler.attempts.store import AttemptStore
from services.scheduler.config import SchedulerSettings
from services.scheduler.database import Database
from services.scheduler.jobs.convert import encoded, failure_to_proto, job_name
from services.scheduler.jobs.endings import JobFailure, failed_ending
from services.scheduler.jobs.job import JobRef, LeaseRef, QueuedJob
from services.scheduler.jobs.lifecycle import JobTransition
from services.scheduler.jobs.store import JobStore
from services.scheduler.jobs.transitions import JobTransitions
from services.scheduler.placement import policy
from services.scheduler.placement.allocation import AllocationKind
from services.scheduler.placement.store import AllocationStore
from services.scheduler.watching.hub import QUEUE_TOPIC, Hub, node_topic

log = structlog.get_logger(__name__)


class Overtaken(Exception):
    """The snapshot is old: the job or the node changed meanwhile."""


class Placer:
    def __init__(
        self, database: Database, jobs: JobTransitions, hub: Hub, clock: Clock, settings: SchedulerSettings
    ) -> None:
        self._database = database
        self._jobs = jobs
        self._hub = hub
        self._clock = clock
        self._settings = settings
        self._failing = FailingItems("placer", clock)
        # How often in a row, one round after the other, the placement of a job collided with rows of others.
        self._collisions: dict[str, int] = {}

    async def run(self) -> None:
        with self._hub.listening(QUEUE_TOPIC) as signal:
            await run_rounds(
                "placer", self.place_round, wait=lambda: signal.wait(self._settings.pipeline_poll_s), clock=self._clock
            )

    async def place_round(self) -> bool:
        """One look at the queue and the fleet; True when something was placed, so that another look pays."""
        settings = self._settings
        page = await JobStore(self._database.pool).list_queued(None, settings.placements_batch_max)
        if not page:
            return False
        fleet = await AllocationStore(self._database.pool).load_fleet(settings.node_memory_s, settings.nodes_max)
        if fleet.nodes_left_out:
            log.error("fleet_cut_off", nodes_max=settings.nodes_max, nodes_left_out=fleet.nodes_left_out)
        before, self._collisions = self._collisions, {}
        placing, placed, seen = policy.Placing(fleet.groups), 0, 0
        while page:
            placed += await self._place(page, placing, fleet.incarnations, before)
            seen += len(page)
            if len(page) < settings.placements_batch_max or page[-1].queue_time is None or not placing.has_room:
                break
            if seen >= settings.placements_seen_max:
                log.error("queue_cut_off", placements_seen_max=settings.placements_seen_max)
                break
            page = await JobStore(self._database.pool).list_queued(page[-1], settings.placements_batch_max)
        return placed > 0

    async def _place(
        self,
        jobs: Sequence[QueuedJob],
        placing: policy.Placing,
        incarnations: Mapping[str, str],
        collided: Mapping[str, int],
    ) -> int:
        """Places what fits of these jobs, after those before them in the queue; returns how many.

        `collided` are the collisions of the rounds before.
        """
        queue = {job_name(job.ref): job for job in jobs if not self._failing.leaves_alone(job_name(job.ref))}
        needs = [
            policy.job_need(owner, job.gpu_count, job.memory_bytes_min, job.failed_nodes)
            for owner, job in queue.items()
        ]
        placed = 0
        for placement in placing.add(needs):
            # A job that fails by a defect holds up no other, and gets no devices in the next rounds.
            with self._failing.trying(placement.owner):
                try:
                    await self.apply(queue[placement.owner].ref, placement, incarnations)
                    placed += 1
                except Overtaken:
                    log.info("placement_overtaken", job=placement.owner, node=placement.node)
                except Exception as error:
                    if self._is_passing_collision(error, placement.owner, collided):
                        log.info("placement_overtaken", job=placement.owner, node=placement.node, error=repr(error))
                        continue
                    failures = self._failing.failures(placement.owner) + 1
                    if database_is_away(error) or failures < self._settings.placement_defects_max:
                        raise
                    log.error("placement_given_up", job=placement.owner, failures=failures, exc_info=error)
                    await self._give_up(queue[placement.owner].ref, failures, error)
        return placed

    def _is_passing_collision(self, error: Exception, owner: str, collided: Mapping[str, int]) -> bool:
        """Another scheduler was faster. Without end it is a defect: the rows themselves contradict each other."""
        if not isinstance(error, asyncpg.UniqueViolationError) or self._failing.failures(owner):
            return False
        self._collisions[owner] = collided.get(owner, 0) + 1
        return self._collisions[owner] <= self._settings.placement_defects_max

    async def _give_up(self, ref: JobRef, failures: int, error: Exception) -> None:
        """Ends a job that waits, as the platform's fault; one that was cancelled meanwhile is left as it is."""
        why = f"placement failed {failures} times ({type(error).__name__}); nothing is charged"
        failure = JobFailure(reason="INTERNAL", message=why, platform_fault=True)
        async with self._database.writing() as connection:
            change = await self._jobs.transition(
                connection, JobTransition.EXPIRE, ref, f"failed: {why}", error=encoded(failure_to_proto(failure))
            )
            if change is not None:
                await self._jobs.end(connection, change, failed_ending(change, failure))

    async def apply(self, ref: JobRef, placement: policy.Placement, incarnations: Mapping[str, str]) -> int:
        """Leases, devices, attempt and transition in one transaction; returns the token of the leading node."""
        parts = (placement, *placement.followers)
        async with self._database.writing() as connection:
            allocations = AllocationStore(connection)
            # In one order, so that two placements never wait for each other.
            for node in sorted(part.node for part in parts):
                if not await allocations.guard_node(node, incarnations[node]):
                    raise Overtaken
            token = await allocations.next_lease_token()
            message = "placed on " + " and ".join(_in_words(part) for part in parts)
            change = await self._jobs.transition(connection, JobTransition.PLACE, ref, message, placed_token=token)
            if change is None:
                raise Overtaken
            now = self._database.now()
            lease = LeaseRef(project_id=ref.project_id, job_id=ref.job_id, lease_token=token)
            for part in parts:
                leads = part is placement
                await allocations.insert(
                    AllocationKind.TRAINING,
                    part,
                    incarnations[part.node],
                    now=now,
                    duration_s=self._settings.lease_duration_s,
                    lease_token=token if leads else await allocations.next_lease_token(),
                    leader_token=None if leads else token,
                )
            incarnation = incarnations[placement.node]
            await AttemptStore(connection).insert(lease, change.attempt_count, placement.node, incarnation)
            self._database.ring(*(node_topic(part.node) for part in parts))
        return token


def _in_words(part: policy.Placement) -> str:
    devices = ", ".join(str(index) for index in part.device_indices)
    return f"{part.node}, {part.hardware_type} {devices}"
