"""Uploads finished checkpoints, one after the other, while the training goes on. Not pure: files, the artifact store.

A checkpoint is hard-linked aside as soon as the child tells of it, because the child removes old ones. It is committed
only when all its files are stored. It knows nothing about what is in them.
"""

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from chassis.errors import DomainError, is_away
from chassis.objects.object_keys import checked_path, key_of
from chassis.objects.transfer import FileTransfer
from finemesh.artifacts.v1 import artifact_pb2
from finemesh.nodes.v1 import node_pb2
from formats.manifests import MANIFEST, FileDigest
from services.trainer.artifacts.convert import artifact_to_proto, digests_from_proto
from services.trainer.attempt.convert import digests_from_event
from services.trainer.attempt.reporter import Reporter
from services.trainer.child.training_child import Event
from services.trainer.node import work_folders

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class _Staged:
    step: int
    # The user asked for it. The others only limit what a crash can cost, so that a newer one replaces an older one.
    asked: bool
    folder: Path
    files: tuple[FileDigest, ...]
    manifest_sha256: str


class CheckpointUploads:
    """`offer` what the child tells, `close` when it tells no more; `run` returns when everything is uploaded."""

    def __init__(
        self, store: FileTransfer, reporter: Reporter, *, staging: Path, key_prefix: str, lease_token: int
    ) -> None:
        self._store = store
        self._reporter = reporter
        self._staging = staging
        self._key_prefix = key_prefix
        self._lease_token = lease_token
        self._waiting: list[_Staged] = []
        self._closed = False
        self._changed = asyncio.Event()
        # Keys that are being stored or are stored, by step.
        self._keys: dict[int, list[str]] = {}

    async def offer(self, event: Event, folder: Path) -> None:
        staged = await asyncio.to_thread(self._stage, event, folder)
        if staged is None:
            return
        superseded = [waiting for waiting in self._waiting if not waiting.asked]
        self._waiting = [waiting for waiting in self._waiting if waiting.asked]
        self._waiting.append(staged)
        self._changed.set()
        for old in superseded:
            log.info("checkpoint_superseded", step=old.step)
            await asyncio.to_thread(work_folders.remove, old.folder)

    def close(self) -> None:
        self._closed = True
        self._changed.set()

    async def run(self) -> None:
        """DataLoss when a file is not what the child announced; a store that stays away only costs the checkpoint."""
        while True:
            while self._waiting:
                await self._upload(self._waiting.pop(0))
            if self._closed:
                return
            self._changed.clear()
            await self._changed.wait()

    async def discard_uncommitted(self) -> None:
        """Removes stored files whose commit was never sent; of the others only the scheduler knows."""
        for step, keys in self._keys.items():
            if step not in self._reporter.committed_steps:
                await self._store.delete(keys)

    async def _upload(self, staged: _Staged) -> None:
        key = f"{self._key_prefix}{staged.step}-{self._lease_token}/"
        self._keys[staged.step] = [key_of(key, file) for file in staged.files]
        try:
            await self._store.upload_all(staged.folder, key, staged.files)
        except DomainError as error:
            if not is_away(error):
                raise
            log.warning("checkpoint_not_stored", step=staged.step, error=str(error))
            return
        finally:
            await asyncio.to_thread(work_folders.remove, staged.folder)
        manifest = node_pb2.CheckpointManifest(
            step=staged.step,
            artifact=artifact_to_proto(key, staged.files),
            manifest_sha256=staged.manifest_sha256,
            asked=staged.asked,
        )
        await self._reporter.checkpoint(manifest, self._delete_obsolete)

    async def _delete_obsolete(self, obsolete: Sequence[artifact_pb2.Artifact]) -> None:
        for artifact in obsolete:
            if not artifact.key.startswith(self._key_prefix):
                log.error("obsolete_checkpoint_refused", key=artifact.key, detail="outside of the job's checkpoints")
                continue
            try:
                await self._store.delete([key_of(artifact.key, file) for file in digests_from_proto(artifact)])
            except DomainError as error:
                if not is_away(error):
                    raise
                # Left behind: it costs space, not correctness.
                log.warning("obsolete_checkpoint_not_deleted", key=artifact.key, error=str(error))

    def _stage(self, event: Event, folder: Path) -> _Staged | None:
        """Blocking. None when the child has removed the checkpoint already: then a newer one follows."""
        step = int(event["step"])
        files = digests_from_event(event)
        staging = self._staging / f"step-{step}"
        try:
            if all(file.path != MANIFEST for file in files):
                size_bytes = (folder / MANIFEST).stat().st_size
                files.append(FileDigest(path=MANIFEST, size_bytes=size_bytes, sha256=str(event["manifest_sha256"])))
            for file in files:
                target = staging / checked_path(file.path)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.link(folder / file.path, target)
        except FileNotFoundError:
            work_folders.remove(staging)
            log.warning("checkpoint_gone", step=step)
            return None
        return _Staged(
            step=step,
            asked=bool(event.get("asked")),
            folder=staging,
            files=tuple(files),
            manifest_sha256=str(event["manifest_sha256"]),
        )
