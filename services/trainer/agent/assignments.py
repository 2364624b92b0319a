"""Makes the attempts of this node equal to what the last heartbeat assigned to it. Not pure: processes.

A device runs one attempt at a time. Between attempts a warm child waits on it.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Iterable

import structlog

from finemesh.nodes.v1 import node_pb2
from services.trainer.attempt.attempt_run import Attempt
from services.trainer.attempt.kit import Kit

log = structlog.get_logger()

ENDED_TOKENS_MAX = 10_000


class Assignments:
    """`reconcile` after every heartbeat until `stop`; then `finish` waits for the last reports.

    `set_aside` says why a device is not used any more, by its index; `device_lost` is set whenever one is added.
    """

    def __init__(self, kit: Kit) -> None:
        self._kit = kit
        self._attempts: dict[int, tuple[Attempt, asyncio.Task[None]]] = {}
        # A response that was on its way while an attempt ended must not start it again.
        self._ended_tokens: OrderedDict[int, None] = OrderedDict()
        self._device_locks = {index: asyncio.Lock() for index in kit.devices}
        self._abandoned_tokens: set[int] = set()
        self._is_stopping = False
        self.set_aside: dict[int, str] = {}
        self.device_lost = asyncio.Event()

    @property
    def lease_tokens(self) -> list[int]:
        return list(self._attempts)

    def reconcile(self, assignments: Iterable[node_pb2.Assignment]) -> None:
        """`assignments` are all that this node has: what is not among them is abandoned."""
        wanted = {assignment.lease.token: assignment for assignment in assignments}
        for token in self._attempts.keys() - wanted.keys() - self._abandoned_tokens:
            if self._attempts[token][0].is_ending:
                continue
            log.warning("no_longer_assigned", lease_token=token)
            self._abandon(token)
        for token, assignment in wanted.items():
            if token not in self._attempts and token not in self._ended_tokens:
                self._start(assignment)
            if token in self._attempts and assignment.desired_state == node_pb2.DESIRED_STATE_CANCEL:
                self._attempts[token][0].cancel()

    def warm_free_devices(self) -> None:
        """A child waits where nothing runs: it would take memory and seconds of the CPU from what does."""
        for index, lock in self._device_locks.items():
            if not lock.locked() and not self._is_stopping:
                self._kit.warm.fill(index)

    async def stop(self) -> None:
        """Every child dies now; its attempt still reports."""
        self._is_stopping = True
        for attempt, _ in self._attempts.values():
            attempt.release()
        await self._kit.warm.close()

    async def finish(self) -> None:
        """Returns when every attempt has reported its ending. Cancelling it abandons those that have not."""
        tasks = [task for _, task in self._attempts.values()]
        try:
            await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            self.abandon_all()

    def abandon_all(self) -> None:
        for token in list(self._attempts):
            self._abandon(token)

    def _start(self, assignment: node_pb2.Assignment) -> None:
        attempt = Attempt(assignment, self._kit)
        log.info("assigned", job=attempt.job_id, lease_token=attempt.token)
        task = asyncio.create_task(self._run(attempt, sorted(set(assignment.device_indices))))
        self._attempts[attempt.token] = (attempt, task)
        task.add_done_callback(lambda _: self._forget(attempt.token))

    async def _run(self, attempt: Attempt, device_indices: list[int]) -> None:
        # A device is taken when the attempt before has left it, its child dead and its memory free.
        locks = [self._device_locks[index] for index in device_indices if index in self._device_locks]
        taken: list[asyncio.Lock] = []
        try:
            for lock in locks:
                await lock.acquire()
                taken.append(lock)
            await attempt.run()
        except Exception:
            log.exception("attempt_broke", lease_token=attempt.token)
        finally:
            if attempt.stuck:
                # Its process is still there: the locks stay taken, and the scheduler is told.
                self.set_aside |= dict.fromkeys(device_indices, attempt.stuck)
                self.device_lost.set()
            else:
                for lock in taken:
                    lock.release()
            self.warm_free_devices()

    def _abandon(self, token: int) -> None:
        # Once: a second cancellation would reach the clean-up that the first one began.
        if token not in self._abandoned_tokens:
            self._abandoned_tokens.add(token)
            self._attempts[token][1].cancel()

    def _forget(self, token: int) -> None:
        del self._attempts[token]
        self._abandoned_tokens.discard(token)
        self._ended_tokens[token] = None
        if len(self._ended_tokens) > ENDED_TOKENS_MAX:
            self._ended_tokens.popitem(last=False)
