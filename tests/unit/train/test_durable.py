"""A folder is whole or absent: half-written ones are never taken for one and are cleared away."""

import errno
import shutil
from pathlib import Path

import pytest

from formats.manifests import revision_of
from services.trainer.train.disk.durable import (
    DiskFull,
    commit_folder,
    read_whole_folder,
    remove_folder,
    remove_unfinished,
)


def fill(folder: Path) -> None:
    (folder / "b").mkdir()
    (folder / "b" / "two.txt").write_text("2")
    (folder / "one.txt").write_text("1")


def test_a_committed_folder_reads_back(tmp_path: Path) -> None:
    files = commit_folder(tmp_path / "step-1", fill, {"step": 1})
    assert [(file.path, file.size_bytes) for file in files] == [("b/two.txt", 1), ("one.txt", 1)]
    assert read_whole_folder(tmp_path / "step-1")["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_a_failed_write_leaves_the_older_folder(tmp_path: Path) -> None:
    commit_folder(tmp_path / "x", fill, {})

    def fail(folder: Path) -> None:
        (folder / "half").write_text("...")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        commit_folder(tmp_path / "x", fail, {})
    read_whole_folder(tmp_path / "x")
    # What is half there is gone at once: it may be what fills the disk.
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        # How safetensors says it.
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_named_whoever_writes(tmp_path: Path, error: Exception) -> None:
    commit_folder(tmp_path / "x", fill, {})

    def fail(folder: Path) -> None:
        (folder / "half").write_text("...")
        raise error

    with pytest.raises(DiskFull) as caught:
        commit_folder(tmp_path / "x", fail, {})
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "x")
    read_whole_folder(tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_kill_while_a_folder_is_removed_leaves_no_half_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit_folder(tmp_path / "x", fill, {})

    def killed(folder: Path, **_: bool) -> None:
        if folder.exists():
            (folder / "one.txt").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_folder(tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["tmp-removed-x"]
    monkeypatch.undo()
    remove_unfinished(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_writer_left_is_cleared_and_named(tmp_path: Path) -> None:
    commit_folder(tmp_path / "x", fill, {})
    (tmp_path / "tmp-y").mkdir()
    (tmp_path / "tmp-removed-z").mkdir()
    (tmp_path / "tmp-one-file").write_text("half")
    assert remove_unfinished(tmp_path) == ["tmp-one-file", "tmp-removed-z", "tmp-y"]
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("damage", ["change", "remove", "add", "manifest"])
def test_any_difference_to_the_manifest_is_seen(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "x"
    commit_folder(folder, fill, {})
    match damage:
        case "change":
            (folder / "one.txt").write_text("7")
        case "remove":
            (folder / "one.txt").unlink()
        case "add":
            (folder / "three.txt").write_text("3")
        case _:
            (folder / "manifest.json").write_text('{"files": [')
    with pytest.raises(ValueError, match="manifest"):
        read_whole_folder(folder)


def test_a_revision_follows_the_content_alone(tmp_path: Path) -> None:
    one, two = commit_folder(tmp_path / "a", fill, {}), commit_folder(tmp_path / "b", fill, None)
    assert revision_of(one) == revision_of(list(reversed(two)))
    assert revision_of(one).startswith("rv_")
    assert len(revision_of(one)) == 35
