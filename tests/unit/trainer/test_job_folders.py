"""Of an ended job's folder in a real store stays what the scheduler names, and nothing outside of it is touched."""

from pathlib import Path
from typing import Any

import pytest

from chassis.clock import SystemClock
from chassis.errors import InvalidArgument, Unavailable
from chassis.objects.object_store import PART_BYTES_MIN, ObjectStore
from finemesh.artifacts.v1 import artifact_pb2
from finemesh.nodes.v1 import node_service_pb2
from services.trainer.agent.job_folders import JobFolders, checked_prefix
from services.trainer.config import TrainerSettings

OWN_STATE = ("optimizer.safetensors", "rng.safetensors", "state.json", "manifest.json")
CHECKPOINT = ("adapter_model.safetensors", "adapter_config.json", *OWN_STATE)


class Stub:
    """Hands out folders once, and notes which were finished."""

    def __init__(self, *folders: node_service_pb2.JobFolder) -> None:
        self.folders = list(folders)
        self.finished: list[tuple[str, str]] = []

    async def ClaimJobFolders(self, request: Any, timeout: float) -> node_service_pb2.ClaimJobFoldersResponse:
        folders, self.folders = self.folders, []
        return node_service_pb2.ClaimJobFoldersResponse(folders=folders)

    async def FinishJobFolder(self, request: Any, timeout: float) -> node_service_pb2.FinishJobFolderResponse:
        self.finished.append((request.tuning_job, request.claim))
        return node_service_pb2.FinishJobFolderResponse()


def stored(root: Path, prefix: str, names: tuple[str, ...]) -> artifact_pb2.Artifact:
    for name in names:
        path = root / prefix / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    files = [artifact_pb2.ArtifactFile(path=name, size_bytes=1, sha256="0" * 64) for name in names]
    return artifact_pb2.Artifact(key=prefix, files=files)


def below(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def job_folder(job: str = "ft-1", **fields: Any) -> node_service_pb2.JobFolder:
    name = f"projects/p/tuningJobs/{job}"
    return node_service_pb2.JobFolder(tuning_job=name, key_prefix=f"jobs/p/{job}/", claim=f"claim-{job}", **fields)


def cleaner(root: Path, stub: Stub) -> JobFolders:
    store = ObjectStore(f"file://{root}", part_bytes=PART_BYTES_MIN, parts_in_flight_max=1)
    return JobFolders(stub, store, TrainerSettings(), SystemClock())


async def test_what_nobody_can_use_is_deleted(tmp_path: Path) -> None:
    kept = stored(tmp_path, "jobs/p/ft-1/checkpoints/20-7/", CHECKPOINT)
    model = stored(tmp_path, "jobs/p/ft-1/models/rv_1/", ("adapter_model.safetensors", "manifest.json"))
    # A checkpoint that was given up, an upload that was never committed, the model of an attempt that lost its lease.
    stored(tmp_path, "jobs/p/ft-1/checkpoints/10-7/", CHECKPOINT)
    stored(tmp_path, "jobs/p/ft-1/checkpoints/30-8/", CHECKPOINT[:2])
    stored(tmp_path, "jobs/p/ft-1/models/rv_0/", ("adapter_model.safetensors",))
    # An upload whose process was killed, and the files of others.
    stored(tmp_path, "jobs/p/ft-1/checkpoints/40-9/", ("adapter_model.safetensors#1",))
    stored(tmp_path, "jobs/p/ft-10/checkpoints/20-3/", CHECKPOINT[:1])
    stored(tmp_path, "files/p/file-1", ("data",))
    stub = Stub(job_folder(checkpoints=[kept], model=model))
    assert await cleaner(tmp_path, stub).clean_some()
    assert below(tmp_path) == [
        "files/p/file-1/data",
        "jobs/p/ft-1/checkpoints/20-7/adapter_config.json",
        "jobs/p/ft-1/checkpoints/20-7/adapter_model.safetensors",
        "jobs/p/ft-1/checkpoints/20-7/state.json",
        "jobs/p/ft-1/models/rv_1/adapter_model.safetensors",
        "jobs/p/ft-1/models/rv_1/manifest.json",
        "jobs/p/ft-10/checkpoints/20-3/adapter_model.safetensors",
    ]
    assert not (tmp_path / "jobs/p/ft-1/checkpoints/30-8").exists()
    assert stub.finished == [("projects/p/tuningJobs/ft-1", "claim-ft-1")]
    assert not await cleaner(tmp_path, stub).clean_some()


async def test_a_folder_of_which_nothing_stays_is_gone(tmp_path: Path) -> None:
    stored(tmp_path, "jobs/p/ft-1/checkpoints/30-8/", CHECKPOINT)
    await cleaner(tmp_path, Stub(job_folder())).clean_some()
    assert not (tmp_path / "jobs/p/ft-1").exists()


async def test_one_that_cannot_be_cleaned_holds_up_no_other(tmp_path: Path) -> None:
    stored(tmp_path, "jobs/p/ft-2/checkpoints/30-8/", CHECKPOINT)
    wrong = job_folder("ft-1")
    wrong.key_prefix = "jobs/p/"
    stub = Stub(wrong, job_folder("ft-2"))
    assert await cleaner(tmp_path, stub).clean_some()
    assert stub.finished == [("projects/p/tuningJobs/ft-2", "claim-ft-2")]


@pytest.mark.parametrize(
    "prefix", ["", "jobs/", "jobs/p/", "jobs/p/ft-1", "jobs/p/ft-2/", "files/p/", "jobs/p/ft-1/../"]
)
def test_only_the_folder_of_the_job_is_taken(prefix: str) -> None:
    folder = job_folder()
    folder.key_prefix = prefix
    with pytest.raises(InvalidArgument):
        checked_prefix(folder)


async def test_a_store_that_is_away_leaves_the_folder_to_others(tmp_path: Path) -> None:
    class Away(ObjectStore):
        async def remove(self, key: str) -> None:
            raise Unavailable("DEPENDENCY_UNAVAILABLE", "away")

    stored(tmp_path, "jobs/p/ft-1/checkpoints/30-8/", CHECKPOINT)
    stub = Stub(job_folder())
    store = Away(f"file://{tmp_path}", part_bytes=PART_BYTES_MIN, parts_in_flight_max=1)
    assert not await JobFolders(stub, store, TrainerSettings(), SystemClock()).clean_some()
    assert stub.finished == []
