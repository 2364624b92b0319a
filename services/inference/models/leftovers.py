"""Removes what imports of killed processes and deleted adapters left behind. Not pure: database, artifact store, disk.

That is their uploads into the store, and their folders.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import structlog

from chassis.clock import Clock
from chassis.objects.held_folders import HeldFolders
from chassis.rounds import run_rounds
from services.inference.models.base_uploads import BaseUploads, is_passing

log = structlog.get_logger()


class Leftovers:
    """`run` at the start of a process and from then on: another process may die as well."""

    def __init__(
        self, uploads: BaseUploads, folders: Sequence[HeldFolders], *, interval_s: float, clock: Clock
    ) -> None:
        self._uploads = uploads
        self._folders = folders
        self._interval_s = interval_s
        self._clock = clock

    async def run(self) -> None:
        await run_rounds(
            "leftovers",
            self.sweep,
            wait=lambda: self._clock.sleep(self._interval_s),
            clock=self._clock,
            is_passing=is_passing,
        )

    async def sweep(self) -> None:
        for folders in self._folders:
            removed = await asyncio.to_thread(folders.sweep)
            if removed:
                log.info("left_folders_removed", folders=removed)
        await self._uploads.collect_dead()
