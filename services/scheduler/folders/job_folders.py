"""Not pure: database. Hands folders of ended jobs to nodes, which delete there what nobody can use any more.

What is deleted is decided by rows that never change back: a job that ended stays ended, a checkpoint that was given up
stays given up, a model that was deleted stays deleted. So no clock, late node or second cleaning can take what is in
use.
"""

from dataclasses import dataclass, replace
from datetime import datetime
from uuid import UUID

from chassis.db.pool import Connection
from chassis.ids import Ids
from services.scheduler.config import SchedulerSettings
from services.scheduler.database import Database
from services.scheduler.folders.store import FolderStore, Kept
from services.scheduler.jobs.job import JobRef

# `job_folders.stage`: what was done already.
AS_LEFT, WITHOUT_OWN_STATE = 0, 1


@dataclass(frozen=True, kw_only=True)
class ClaimedFolder:
    ref: JobRef
    claim: UUID
    kept: Kept


class JobFolders:
    def __init__(self, database: Database, ids: Ids, settings: SchedulerSettings) -> None:
        self._database = database
        self._ids = ids
        self._settings = settings

    async def claim(self, node: str) -> list[ClaimedFolder]:
        """A few folders that are the node's for `folder_claim_s`."""
        settings, claim = self._settings, self._ids.uuid()
        stages = ((AS_LEFT, settings.run_state_retention_s), (WITHOUT_OWN_STATE, settings.checkpoint_retention_s))
        claimed: list[ClaimedFolder] = []
        async with self._database.writing() as connection:
            folders = FolderStore(connection)
            for stage, retention_s in stages:
                refs = await folders.claim(
                    stage, retention_s, node, claim, settings.folder_claim_s, settings.folders_batch_max
                )
                if stage == WITHOUT_OWN_STATE:
                    await folders.give_up_checkpoints(refs)
                kept = await folders.kept(refs)
                claimed += [ClaimedFolder(ref=ref, claim=claim, kept=kept[ref.job_id]) for ref in refs]
            claimed += await self._claim_deleted_models(folders, node)
        return claimed

    async def delete_model(self, connection: Connection, ref: JobRef, delete_time: datetime) -> bool:
        """From now on no job starts from it, and its files go when those are done that do. False when that is known
        already, or there is no such job."""
        return await FolderStore(connection).note_deleted_model(ref, delete_time)

    async def _claim_deleted_models(self, folders: FolderStore, node: str) -> list[ClaimedFolder]:
        # A claim of its own: the same folder may be at one of the stages as well, and each is finished for itself.
        settings, claim = self._settings, self._ids.uuid()
        refs = await folders.claim_deleted_models(
            settings.deleted_model_retention_s, node, claim, settings.folder_claim_s, settings.folders_batch_max
        )
        kept = await folders.kept(refs)
        return [ClaimedFolder(ref=ref, claim=claim, kept=replace(kept[ref.job_id], model=None)) for ref in refs]

    async def finish(self, ref: JobRef, node: str, claim: UUID) -> bool:
        """False when the claim was taken over, or was never this node's: then whoever has it finishes."""
        async with self._database.writing() as connection:
            return await FolderStore(connection).finish(ref, node, claim)
