"""What becomes of each event of a leading node's child: reports, checkpoint uploads, curves. Not pure: protobuf.

It decides how nothing ends, except a run that counts its data differently from its quote.
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog

from finemesh.tuning.v1 import tuning_job_pb2 as tuning
from services.trainer.attempt.checkpoint_uploads import CheckpointUploads
from services.trainer.attempt.convert import platform_fault_to_proto
from services.trainer.attempt.reporter import AttemptOver, Reporter
from services.trainer.attempt.run_view import ProgressReport, RunView
from services.trainer.child.training_child import Child, ChildProtocolError, Event
from services.trainer.integrations.job_integrations import JobIntegrations

log = structlog.get_logger()


async def hear(child: Child, on_event: Callable[[Event], Awaitable[None]], *, silence_s_max: float | None) -> None:
    """Until the child closes its output. A child that is silent for longer than `silence_s_max` hangs."""
    events = aiter(child.events())
    while True:
        try:
            async with asyncio.timeout(silence_s_max):
                event = await anext(events, None)
        except TimeoutError:
            raise AttemptOver(platform_fault_to_proto("the training process hung")) from None
        if event is None:
            return
        try:
            await on_event(event)
        except (KeyError, TypeError, ValueError) as error:
            raise ChildProtocolError(f"the child's {event['type']} event is malformed: {error!r}") from error


class ChildEvents:
    """Takes each event by `on_event` and keeps the ones that the ending is made of."""

    def __init__(
        self,
        counts: tuning.DatasetCounts,
        folder: Path,
        view: RunView,
        reporter: Reporter,
        uploads: CheckpointUploads,
        integrations: JobIntegrations,
    ) -> None:
        self._counts = counts
        self._folder = folder
        self._view = view
        self._reporter = reporter
        self._uploads = uploads
        self._integrations = integrations
        self.exported: Event | None = None
        # `finished`, `stopped` or `failed`.
        self.last: Event | None = None
        # Steps that were done beyond the last metered range. They are metered only when the job ends here; otherwise
        # they are done again, in their planned range.
        self.partial: Event | None = None

    async def on_event(self, event: Event) -> None:
        match event["type"]:
            case "started":
                self._on_started(event)
            case "preparing":
                log.info("preparing", **{name: value for name, value in event.items() if name != "type"})
            case "progress" if event.get("partial"):
                self.partial = event
            case "progress":
                await self.report(self._view.progress(event))
            case "evaluation":
                await self.report(self._view.evaluation(event))
            case "warning":
                await self._reporter.progress(self._view.warning(event))
            case "checkpoint":
                await self._uploads.offer(event, own_folder(self._folder, event["path"]))
            case "exported":
                self.exported = event
            case "finished" | "stopped" | "failed":
                self.last = event

    async def report(self, report: ProgressReport) -> None:
        self._integrations.add(report.metrics)
        await self._reporter.progress(report)

    def _on_started(self, event: Event) -> None:
        self._view.started(event)
        wrong = mismatch(event, self._counts)
        if wrong is not None:
            raise AttemptOver(platform_fault_to_proto(f"{wrong}; it was priced by other counts", retryable=False))


def mismatch(started: Event, counts: tuning.DatasetCounts) -> str | None:
    """What the run counts differently from the analysis that priced it; None when both agree."""
    pairs = [("training tokens", int(started["train_token_count"]), counts.training_tokens)]
    if counts.validation_tokens and int(started["evaluations_total"]):
        pairs.append(("validation tokens", int(started["validation_token_count"]), counts.validation_tokens))
    wrong = [f"{run} {name} instead of {quoted}" for name, run, quoted in pairs if quoted and run != quoted]
    return "the run counts " + " and ".join(wrong) if wrong else None


def own_folder(folder: Path, path: str) -> Path:
    """A folder that the child named. ChildProtocolError when it lies outside of the child's work folder."""
    named = (folder / path).resolve()
    if not named.is_relative_to(folder.resolve()):
        raise ChildProtocolError("the child named a folder outside of its work folder")
    return named
