"""Not pure: database. Allocations for serving, under the same policy and constraint as training.

It knows no endpoint: an owner is a name, runs on a node, and says itself how long it wants its devices.
"""

from collections.abc import Sequence

import asyncpg

from chassis.errors import Aborted, FailedPrecondition, NotFound, ResourceExhausted, invalid
from services.scheduler.config import SchedulerSettings
from services.scheduler.database import Database
from services.scheduler.placement import policy
from services.scheduler.placement.allocation import AllocationKind, AllocationRecord
from services.scheduler.placement.store import AllocationStore
from services.scheduler.watching.hub import QUEUE_TOPIC

# Somebody else was faster this many times in a row: the caller asks again later anyway.
RACES_MAX = 5


class ServingAllocations:
    def __init__(self, database: Database, settings: SchedulerSettings) -> None:
        self._database = database
        self._settings = settings

    async def create(self, need: policy.Need) -> AllocationRecord | str:
        """The owner's allocation, or what it waits for, in words. ResourceExhausted for what no node could give; other
        typed errors where the owner's node is not known, or could not give what another could."""
        store = AllocationStore(self._database.pool)
        for _ in range(RACES_MAX):
            current = await store.get(need.owner)
            if current is not None:
                return current
            fleet = await store.load_fleet(self._settings.node_memory_s, self._settings.nodes_max)
            problem = policy.too_large(need, fleet.groups)
            if problem is not None:
                raise ResourceExhausted(
                    "CAPACITY_EXHAUSTED",
                    f"no registered node could ever give {problem.requested}; the largest has {problem.largest}",
                    metadata={"requested": problem.requested, "largest": problem.largest},
                )
            groups = of_owners_node(need, fleet.groups)
            group = policy.choose(need, groups)
            if group is None:
                return policy.waiting_for(need, groups, 1)
            await self._take(need, group, fleet)
        return f"{need.count} GPUs; others were faster"

    async def renew(self, owner: str, lease_token: int) -> AllocationRecord:
        """Raises Aborted for an allocation that is not in force any more."""
        async with self._database.writing() as connection:
            store = AllocationStore(connection)
            renewed = await store.renew(owner, lease_token, self._settings.lease_duration_s)
            current = await store.get(owner) if renewed else None
        if current is None:
            raise Aborted("LEASE_STALE", f"allocation {lease_token} is not in force any more; stop serving on it")
        return current

    async def release(self, owner: str, lease_token: int) -> None:
        async with self._database.writing() as connection:
            store, now = AllocationStore(connection), self._database.now()
            if await store.release(AllocationKind.SERVING, lease_token, owner, now):
                self._database.ring(QUEUE_TOPIC)

    async def _take(self, need: policy.Need, group: policy.DeviceGroup, fleet: policy.Fleet) -> None:
        placement = policy.take(need, 1, group)
        incarnation = fleet.incarnations[group.node]
        try:
            async with self._database.writing() as connection:
                store = AllocationStore(connection)
                if not await store.guard_node(placement.node, incarnation):
                    return
                await store.insert(
                    AllocationKind.SERVING,
                    placement,
                    incarnation,
                    now=self._database.now(),
                    duration_s=self._settings.lease_duration_s,
                    lease_token=await store.next_lease_token(),
                )
        except asyncpg.UniqueViolationError:
            # The snapshot is old: a device, or this owner, was served meanwhile. The next round sees it.
            return


def of_owners_node(need: policy.Need, groups: Sequence[policy.DeviceGroup]) -> Sequence[policy.DeviceGroup]:
    """The devices that a process on its own node can use: others are in machines that it does not run on."""
    if not need.node:
        nodes = {group.node for group in groups if group.ready} or {group.node for group in groups}
        if len(nodes) > 1:
            raise invalid("node", f"must name the node that the owner runs on; {len(nodes)} are registered")
        return [group for group in groups if group.node in nodes]
    own = [group for group in groups if group.node == need.node]
    if not own:
        raise NotFound("NOT_FOUND", f"node {need.node} is not registered", metadata={"node": need.node})
    problem = policy.too_large(need, own)
    if problem is not None:
        raise FailedPrecondition(
            "CAPACITY_EXHAUSTED",
            f"node {need.node} could never give {problem.requested}, another could; the largest has {problem.largest}",
            metadata={"node": need.node, "requested": problem.requested, "largest": problem.largest},
        )
    return own
