"""An attempt on a node of a gang that does not lead: its processes train with the others, and the leading node speaks for all.

It tells the scheduler nothing but that it failed; when the attempt is over its lease is taken away, and until then it waits.
"""

import asyncio
from pathlib import Path

from finemesh.nodes.v1 import node_pb2
from services.trainer import event_map
from services.trainer.attempt import Attempt, Kit
from services.trainer.child import Child
from services.trainer.event_map import Event
from services.trainer.reports import Ending, LeaseLostError
from services.trainer.uploads import CheckpointUploads


class FollowingAttempt(Attempt):
    _speaks = False
    _has_done_its_part = False

    def cancel(self) -> None:
        """The processes agree on the step after which they stop, and the leading node says so."""
        if self._child is not None and not self._cancelled:
            self._cancelled = True
            self._child.ask_to_stop()

    def release(self) -> None:
        """Without this node the run cannot go on, whatever becomes of the job. Once its processes have ended well, nobody needs it:
        a word from here would end the attempt that the leading node is about to finish."""
        if not self._has_done_its_part:
            self._interrupt(event_map.failed_platform("a node of the gang was shut down", drained="true"))
        elif not self._interrupted.done():
            self._interrupted.set_exception(LeaseLostError("this node has done its part and was shut down"))

    async def _on_event(self, event: Event, folder: Path, uploads: CheckpointUploads) -> None:
        if event["type"] == "failed":
            self._last_event = event

    async def _ending_of(self, child: Child, exit_code: int, folder: Path) -> Ending:
        self._has_done_its_part = exit_code == 0
        last = self._last_event
        if last is None and exit_code and not self._cancelled:
            return event_map.failed_without_a_word(exit_code, child.last_words)
        if last is not None and last["kind"] != "user" and not event_map.is_lost_peer(last):
            return event_map.failed_by_child(last)
        # What the user has to mend the leading node reports behind what it still has to meter: every process finds it, or hears
        # of it. Why a peer is gone its own node knows, and if that is gone, too, its lease ends.
        await asyncio.Event().wait()
        raise AssertionError("nobody sets the event")


def attempt_for(assignment: node_pb2.Assignment, kit: Kit) -> Attempt:
    if assignment.HasField("gang") and not assignment.gang.leads:
        return FollowingAttempt(assignment, kit)
    return Attempt(assignment, kit)
