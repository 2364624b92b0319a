"""Finished checkpoints on their way to the artifact store, one after the other, while the training goes on.

A checkpoint is hard-linked aside as soon as it is told, because the child removes old ones; it is committed only when
all its files are stored. It knows nothing about what is in them.
"""

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from chassis.errors import Unavailable
from finemesh.artifacts.v1 import artifact_pb2
from finemesh.nodes.v1 import node_pb2
from services.trainer import workdir
from services.trainer.event_map import Event, files_of
from services.trainer.reports import Reporter
from services.trainer.transfer import ArtifactStore, StoredFile, checked_path, key_of

log = structlog.get_logger()

MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class _Staged:
    step: int
    # The user asked for it; the others only limit what a crash can cost, so that a newer one makes an older one needless.
    asked: bool
    folder: Path
    files: tuple[StoredFile, ...]
    manifest_sha256: str


def artifact_of(key: str, files: Sequence[StoredFile]) -> artifact_pb2.Artifact:
    entries = [artifact_pb2.ArtifactFile(path=f.path, size_bytes=f.size_bytes, sha256=f.sha256) for f in files]
    return artifact_pb2.Artifact(key=key, files=entries)


def stored_files(artifact: artifact_pb2.Artifact) -> list[StoredFile]:
    return [StoredFile(path=f.path, size_bytes=f.size_bytes, sha256=f.sha256) for f in artifact.files]


class CheckpointUploads:
    """`offer` what the child tells, `close` when it tells no more; `run` returns when everything is handed over."""

    def __init__(
        self, store: ArtifactStore, reporter: Reporter, *, staging: Path, key_prefix: str, lease_token: int
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
            log.info("a newer checkpoint takes the place of one that waited for its upload", step=old.step)
            await asyncio.to_thread(workdir.remove, old.folder)

    def close(self) -> None:
        self._closed = True
        self._changed.set()

    async def run(self) -> None:
        """DataLoss when a file is not what the child announced; a store that stays away only costs the checkpoint."""
        while True:
            while self._waiting:
                await self._hand_over(self._waiting.pop(0))
            if self._closed:
                return
            self._changed.clear()
            await self._changed.wait()

    async def discard_uncommitted(self) -> None:
        """Removes stored files whose commit was never sent; of the others only the scheduler knows."""
        for step, keys in self._keys.items():
            if step not in self._reporter.committed_steps:
                await self._store.delete(keys)

    async def _hand_over(self, staged: _Staged) -> None:
        key = f"{self._key_prefix}{staged.step}-{self._lease_token}/"
        self._keys[staged.step] = [key_of(key, file) for file in staged.files]
        try:
            await self._store.upload_all(staged.folder, key, staged.files)
        except Unavailable as error:
            log.warning("checkpoint not stored", step=staged.step, error=str(error))
            return
        finally:
            await asyncio.to_thread(workdir.remove, staged.folder)
        manifest = node_pb2.CheckpointManifest(
            step=staged.step,
            artifact=artifact_of(key, staged.files),
            manifest_sha256=staged.manifest_sha256,
            asked=staged.asked,
        )
        await self._reporter.checkpoint(manifest, self._delete_obsolete)

    async def _delete_obsolete(self, obsolete: Sequence[artifact_pb2.Artifact]) -> None:
        for artifact in obsolete:
            if not artifact.key.startswith(self._key_prefix):
                log.error("refused to delete outside of the job's checkpoints", key=artifact.key)
                continue
            try:
                await self._store.delete([key_of(artifact.key, file) for file in stored_files(artifact)])
            except Unavailable as error:
                # Left behind: it costs space, not correctness.
                log.warning("obsolete checkpoint not deleted", key=artifact.key, error=str(error))

    def _stage(self, event: Event, folder: Path) -> _Staged | None:
        """Blocking. None when the child has removed the checkpoint already: then a newer one follows."""
        step = int(event["step"])
        files = files_of(event)
        staging = self._staging / f"step-{step}"
        try:
            if all(file.path != MANIFEST for file in files):
                size_bytes = (folder / MANIFEST).stat().st_size
                files.append(StoredFile(path=MANIFEST, size_bytes=size_bytes, sha256=str(event["manifest_sha256"])))
            for file in files:
                target = staging / checked_path(file.path)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.link(folder / file.path, target)
        except FileNotFoundError:
            workdir.remove(staging)
            log.warning("a checkpoint was gone before it could be kept", step=step)
            return None
        return _Staged(
            step=step,
            asked=bool(event.get("asked")),
            folder=staging,
            files=tuple(files),
            manifest_sha256=str(event["manifest_sha256"]),
        )
