"""Files are kept by what they contain: the cache downloads once, and a revision follows from the digests."""

import hashlib
import os
from pathlib import Path

import pytest

from chassis.clock import SystemClock
from chassis.errors import DataLoss
from chassis.objects.object_keys import FileEntry
from chassis.objects.object_store import PART_BYTES_MIN, ObjectStore
from chassis.objects.transfer import FileTransfer
from formats.manifests import FileDigest, revision_of
from services.trainer.artifacts.file_cache import FileCache


def make_store(folder: Path) -> FileTransfer:
    client = ObjectStore((folder / "store").as_uri(), part_bytes=64 * 1024, parts_in_flight_max=2)
    return FileTransfer(client, SystemClock(), chunk_bytes=64 * 1024, concurrent_max=2, attempts_max=2)


def described(content: bytes, path: str = "") -> FileDigest:
    return FileDigest(path=path, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def test_a_revision_is_that_of_the_content_in_any_order() -> None:
    files = [described(b"a", "x"), described(b"b", "y")]
    assert revision_of(files) == revision_of(files[::-1])
    assert revision_of(files) != revision_of([described(b"b", "x"), described(b"a", "y")])
    lines = "".join(sorted(f"{file.path}\0{file.sha256}\n" for file in files))
    assert revision_of(files) == "rv_" + hashlib.sha256(lines.encode()).hexdigest()[:32]


async def test_the_cache_downloads_once_and_survives_the_loss_of_the_store(tmp_path: Path) -> None:
    store, content = make_store(tmp_path), b"weights"
    cache = FileCache(tmp_path / "cache", store, size_bytes_max=10**6, concurrent_max=2)
    (tmp_path / "store" / "m").mkdir()
    for path in ("one", "two"):
        (tmp_path / "store" / "m" / path).write_bytes(content)
    files = [described(content, "one"), described(content, "sub/two")]
    (tmp_path / "store" / "m" / "sub").mkdir()
    (tmp_path / "store" / "m" / "sub" / "two").write_bytes(content)
    await cache.place("m/", files, tmp_path / "first")
    for stored in (tmp_path / "store").rglob("*"):
        if stored.is_file():
            stored.unlink()
    await cache.place("m/", files, tmp_path / "second")
    assert (tmp_path / "second" / "sub" / "two").read_bytes() == content
    assert len([path for path in (tmp_path / "cache" / "objects").rglob("*") if path.is_file()]) == 1
    assert list((tmp_path / "cache" / "partial").iterdir()) == []


async def test_a_full_cache_forgets_the_oldest_but_no_job_loses_its_file(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    cache = FileCache(tmp_path / "cache", store, size_bytes_max=1000, concurrent_max=2)
    for number in range(4):
        content = bytes([number]) * 400
        (tmp_path / "store" / f"f{number}").write_bytes(content)
        await cache.place(f"f{number}", [described(content)], tmp_path / "job")
    kept = [path for path in (tmp_path / "cache" / "objects").rglob("*") if path.is_file()]
    assert len(kept) == 2
    assert sorted(path.name for path in (tmp_path / "job").iterdir()) == ["f0", "f1", "f2", "f3"]


async def test_a_corrupt_download_leaves_nothing_in_the_cache(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", make_store(tmp_path), size_bytes_max=1000, concurrent_max=2)
    (tmp_path / "store" / "f").write_bytes(b"wrong")
    with pytest.raises(DataLoss):
        await cache.place("f", [described(b"right")], tmp_path / "job")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


async def test_another_agent_that_starts_under_another_clock_takes_no_download(tmp_path: Path) -> None:
    folder = tmp_path / "cache"

    class Slow(FileTransfer):
        async def download(self, key: str, file: FileEntry, target: Path) -> None:
            target.write_bytes(b"content")
            for path in (folder / "partial").rglob("*"):
                os.utime(path, (0, 0))
            FileCache(folder, self, size_bytes_max=1000, concurrent_max=2)

    store = ObjectStore(f"file://{tmp_path}", part_bytes=PART_BYTES_MIN, parts_in_flight_max=1)
    slow = Slow(store, SystemClock(), chunk_bytes=4096, concurrent_max=1, attempts_max=1)
    cache = FileCache(folder, slow, size_bytes_max=1000, concurrent_max=2)
    await cache.place("f", [described(b"content")], tmp_path / "job")
    assert (tmp_path / "job/f").read_bytes() == b"content"


async def test_what_a_killed_agent_was_fetching_goes_when_one_starts(tmp_path: Path) -> None:
    left = tmp_path / "cache/partial/left"
    left.mkdir(parents=True)
    (left / "file").write_bytes(b"x")
    FileCache(tmp_path / "cache", make_store(tmp_path), size_bytes_max=1000, concurrent_max=2)
    assert not left.exists()
