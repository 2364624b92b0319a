"""Delivers the reports of one attempt to the scheduler, in order. Not pure: gRPC.

A report is repeated until it is accepted or the lease is stale; what it says is for others. The queue is bounded: when
it is full, whoever reports waits, and so in the end does the child.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog

from chassis.backoff import Backoff
from chassis.clock import Clock
from chassis.errors import (
    Cancelled,
    DeadlineExceeded,
    DomainError,
    Internal,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from finemesh.artifacts.v1 import artifact_pb2
from finemesh.nodes.v1 import node_pb2, node_service_pb2, node_service_pb2_grpc
from services.trainer.attempt.run_view import ProgressReport
from services.trainer.config import TrainerSettings

log = structlog.get_logger()

Ending = node_service_pb2.AttemptSucceeded | node_service_pb2.AttemptFailed | node_service_pb2.AttemptStopped
OnObsolete = Callable[[Sequence[artifact_pb2.Artifact]], Awaitable[None]]

LEASE_STALE = "LEASE_STALE"
_TRANSIENT = (Unavailable, DeadlineExceeded, Cancelled, Internal)


class LeaseLostError(Exception):
    """Somebody else holds the job now, or nobody wants it any more: nothing of this attempt counts from here on."""


class ReportRefusedError(Exception):
    """The scheduler will not take this report, however often it is repeated."""


class AttemptOver(Exception):
    """The attempt ends, with `ending`, before its child said so."""

    def __init__(self, ending: Ending) -> None:
        super().__init__(type(ending).__name__)
        self.ending = ending


@dataclass(frozen=True)
class _Started:
    hub_commit: str


@dataclass(frozen=True)
class _Checkpoint:
    manifest: node_pb2.CheckpointManifest
    on_obsolete: OnObsolete


@dataclass(frozen=True)
class _Finished:
    ending: Ending


_Request = TypeVar(
    "_Request",
    node_service_pb2.StartAttemptRequest,
    node_service_pb2.ReportProgressRequest,
    node_service_pb2.CommitCheckpointRequest,
    node_service_pb2.FinishAttemptRequest,
)
_Report = _Started | ProgressReport | _Checkpoint | _Finished


class Reporter:
    """One per attempt. `run` delivers what the other methods queue, and returns after the ending is accepted."""

    def __init__(
        self,
        stub: "node_service_pb2_grpc.NodeServiceAsyncStub",
        lease: node_pb2.Lease,
        settings: TrainerSettings,
        clock: Clock,
    ) -> None:
        self._stub = stub
        self._lease_token = lease.token
        self._tuning_job = lease.tuning_job
        self._settings = settings
        self._clock = clock
        self._queue: deque[_Report] = deque()
        self._changed = asyncio.Condition()
        # Set while something waits that must not be held back to collect more progress.
        self._urgent = asyncio.Event()
        # Set before the ending is sent: a heartbeat may know that the lease is over before the answer has arrived here.
        self.is_ending = False
        # Steps of checkpoints whose commit was sent at least once: whether it was accepted may never be known here.
        self.committed_steps: set[int] = set()

    async def started(self, hub_commit: str = "") -> None:
        await self._put(_Started(hub_commit))

    async def progress(self, report: ProgressReport) -> None:
        await self._put(report)

    async def checkpoint(self, manifest: node_pb2.CheckpointManifest, on_obsolete: OnObsolete) -> None:
        """Is sent after all progress reported before it, so that a resume from it leaves no hole in the usage."""
        await self._put(_Checkpoint(manifest, on_obsolete))

    async def finished(self, ending: Ending) -> None:
        await self._put(_Finished(ending))

    async def run(self) -> None:
        """LeaseLostError or ReportRefusedError end it early."""
        while True:
            report = await self._next()
            if isinstance(report, ProgressReport):
                await self._send_progress(report)
            elif isinstance(report, _Checkpoint):
                await self._send_checkpoint(report)
            elif isinstance(report, _Started):
                request = node_service_pb2.StartAttemptRequest(hub_commit=report.hub_commit)
                await self._deliver(self._stub.StartAttempt, self._fenced(request))
            else:
                await self._send_ending(report.ending)
                return

    async def _put(self, report: _Report) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._queue) < self._settings.report_queue_max)
            self._queue.append(report)
            if not isinstance(report, ProgressReport):
                self._urgent.set()
            self._changed.notify_all()

    async def _next(self) -> _Report:
        async with self._changed:
            await self._changed.wait_for(lambda: bool(self._queue))
            is_progress = isinstance(self._queue[0], ProgressReport)
        if is_progress:
            await self._collect_more()
        async with self._changed:
            report = self._queue.popleft()
            while isinstance(report, ProgressReport) and self._queue:
                later = self._queue[0]
                if not isinstance(later, ProgressReport) or not self._fits(report, later):
                    break
                report.merge(later)
                self._queue.popleft()
            if all(isinstance(waiting, ProgressReport) for waiting in self._queue):
                self._urgent.clear()
            self._changed.notify_all()
        return report

    def _fits(self, report: ProgressReport, later: ProgressReport) -> bool:
        return len(report.metrics) + len(later.metrics) <= self._settings.report_metrics_max

    async def _collect_more(self) -> None:
        pause = asyncio.ensure_future(self._clock.sleep(self._settings.report_interval_s))
        urgent = asyncio.ensure_future(self._urgent.wait())
        try:
            await asyncio.wait((pause, urgent), return_when=asyncio.FIRST_COMPLETED)
        finally:
            pause.cancel()
            urgent.cancel()

    async def _send_progress(self, report: ProgressReport) -> None:
        """A range of more steps than one request may hold goes in parts; it is metered with the last of them."""
        count_max = self._settings.report_metrics_max
        for start in range(0, max(1, len(report.metrics)), count_max):
            request = node_service_pb2.ReportProgressRequest(metrics=report.metrics[start : start + count_max])
            if start + count_max >= len(report.metrics):
                request.usage.extend(report.usage)
                request.warnings.extend(report.warnings)
            await self._deliver(self._stub.ReportProgress, self._fenced(request))

    async def _send_checkpoint(self, report: _Checkpoint) -> None:
        request = node_service_pb2.CommitCheckpointRequest(checkpoint=report.manifest)
        self.committed_steps.add(report.manifest.step)
        response = await self._deliver(self._stub.CommitCheckpoint, self._fenced(request))
        await report.on_obsolete(response.obsolete)

    async def _send_ending(self, ending: Ending) -> None:
        self.is_ending = True
        request = node_service_pb2.FinishAttemptRequest()
        if isinstance(ending, node_service_pb2.AttemptSucceeded):
            request.succeeded.CopyFrom(ending)
        elif isinstance(ending, node_service_pb2.AttemptFailed):
            request.failed.CopyFrom(ending)
        else:
            request.stopped.CopyFrom(ending)
        await self._deliver(self._stub.FinishAttempt, self._fenced(request))

    def _fenced(self, request: _Request) -> _Request:
        request.lease_token = self._lease_token
        request.tuning_job = self._tuning_job
        return request

    async def _deliver(self, call: Callable[..., Awaitable[Any]], request: Any) -> Any:
        settings = self._settings
        backoff = Backoff(first_s=settings.report_backoff_s_min, last_s=settings.report_backoff_s_max)
        began_s = self._clock.monotonic()
        while True:
            try:
                return await call(request, timeout=settings.report_timeout_s)
            except DomainError as error:
                self._raise_if_over(error, began_s)
                log.warning("report_not_accepted", report=type(request).__name__, error=str(error))
                await self._clock.sleep(max(backoff.next_s(), error.retry_after_s or 0.0))

    def _raise_if_over(self, error: DomainError, began_s: float) -> None:
        if error.reason == LEASE_STALE or isinstance(error, NotFound):
            raise LeaseLostError(str(error)) from error
        crowded = isinstance(error, ResourceExhausted) and error.reason != "SIZE_LIMIT"
        if not crowded and not isinstance(error, _TRANSIENT):
            raise ReportRefusedError(str(error)) from error
        if self._clock.monotonic() - began_s > self._settings.report_patience_s:
            raise ReportRefusedError(f"given up after {self._settings.report_patience_s} s: {error}") from error
