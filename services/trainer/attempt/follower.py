"""The role of a node of a gang that does not lead: its processes train, and the leading node speaks for all.

It reports nothing but its own failure. When the attempt is over its lease is taken away, and until then it waits.
"""

import asyncio
from pathlib import Path

from services.trainer.attempt import convert
from services.trainer.attempt.child_events import hear
from services.trainer.attempt.reporter import Ending, LeaseLostError
from services.trainer.child.training_child import Child, Event


class Follower:
    def __init__(self) -> None:
        self._is_cancelled = False
        self._has_done_its_part = False
        self._failed: Event | None = None

    @property
    def is_cancelled(self) -> bool:
        return self._is_cancelled

    def open(self, folder: Path) -> None:
        """Nothing runs beside the child."""

    async def hear(self, child: Child, hub_commit: str) -> None:
        # However long it is silent: the leading node notices when the run hangs.
        await hear(child, self._on_event, silence_s_max=None)

    async def ending(self, child: Child, exit_code: int) -> Ending:
        self._has_done_its_part = exit_code == 0
        failed = self._failed
        if failed is None and exit_code and not self._is_cancelled:
            return convert.exit_to_proto(exit_code, child.last_words)
        if failed is not None and failed["kind"] != "user" and not _is_lost_peer(failed):
            return convert.failed_event_to_proto(failed)
        # A fault of the user is found by every process. The leading node reports it, after what it still has to meter.
        # Why a peer was lost is reported by the peer's own node; if that node is gone, too, its lease ends.
        await asyncio.Event().wait()
        raise AssertionError("nobody sets the event")

    def cancel(self, child: Child | None) -> Ending | None:
        """The processes agree on the step after which they stop, and the leading node reports it."""
        if child is not None:
            self._is_cancelled = True
            child.ask_to_stop()
        return None

    def ending_when_released(self) -> Ending:
        """Without this node the run cannot go on, so that the attempt fails, whatever becomes of the job.

        Once its processes have ended well this node is not needed any more. A report from here would then end the
        attempt that the leading node is about to finish.
        """
        if self._has_done_its_part:
            raise LeaseLostError("this node has done its part and was shut down")
        return convert.platform_fault_to_proto("a node of the gang was shut down", drained="true")

    async def close(self) -> None:
        """Nothing runs beside the child."""

    async def abandon(self) -> None:
        """Nothing runs beside the child."""

    async def discard_uncommitted(self) -> None:
        """It stores nothing."""

    async def _on_event(self, event: Event) -> None:
        if event["type"] == "failed":
            self._failed = event


def _is_lost_peer(failed: Event) -> bool:
    """Whether a process failed because another one of its run had."""
    return bool((failed.get("details") or {}).get("cause") == "lost_peer")
