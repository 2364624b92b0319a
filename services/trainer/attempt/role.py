"""The strategy of an attempt: what its node does with the run besides running it.

A job on one node has one attempt, whose node leads. In a gang one node leads and speaks for all; the others follow.
"""

from pathlib import Path
from typing import Protocol

from services.trainer.attempt.reporter import Ending
from services.trainer.child.training_child import Child


class Role(Protocol):
    """`open` comes first; `cancel` and `ending_when_released` may be called at any time, also before it."""

    @property
    def is_cancelled(self) -> bool: ...

    def open(self, folder: Path) -> None:
        """Starts what runs beside the child, in the work folder of the attempt."""

    async def hear(self, child: Child, hub_commit: str) -> None:
        """Until the child tells no more. `hub_commit` is where its weights come from, if they come from the hub."""

    async def ending(self, child: Child, exit_code: int) -> Ending:
        """How the attempt ends, now that its child has ended."""

    def cancel(self, child: Child | None) -> Ending | None:
        """The scheduler wants the job to end. The ending, when it can end at once; `child` is None before it runs."""

    def ending_when_released(self) -> Ending:
        """The node goes away. LeaseLostError when nothing is to be reported."""

    async def close(self) -> None:
        """The ending was accepted; what runs beside may finish within its time."""

    async def abandon(self) -> None:
        """Ends what runs beside at once. Any number of times."""

    async def discard_uncommitted(self) -> None:
        """Removes from the artifact store what the scheduler was never told of."""
