"""What may be a path, and what happens to bytes that are not those that were recorded."""

import hashlib
from pathlib import Path

import pytest

from chassis.clock import SystemClock
from chassis.errors import DataLoss, InvalidArgument
from formats.manifests import revision_of
from services.trainer.artifacts.file_cache import FileCache
from services.trainer.artifacts.transfer import ArtifactStore, StoredFile, checked_path, key_of


def make_store(folder: Path, **limits: int) -> ArtifactStore:
    given = {"chunk_bytes": 64 * 1024, "concurrent_max": 2, "attempts_max": 2, **limits}
    return ArtifactStore((folder / "store").as_uri(), SystemClock(), **given)


def described(content: bytes, path: str = "") -> StoredFile:
    return StoredFile(path=path, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize(
    "path",
    [
        "",
        ".",
        "..",
        "../x",
        "a/../b",
        "/etc/passwd",
        "a//b",
        "a/",
        "a\\b",
        "a\0b",
        "a b",
        "%2e%2e/x",
        "x" * 2000,
        "é",
        "a\n",
    ],
)
def test_a_path_that_could_leave_its_folder_is_refused(path: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        checked_path(path)
    assert refused.value.reason == "INVALID_FIELD"


@pytest.mark.parametrize("path", ["config.json", "model-00001-of-00002.safetensors", "a/b_c/d.e", ".hidden", "..."])
def test_plain_relative_paths_pass(path: str) -> None:
    assert checked_path(path) == path


def test_a_key_is_checked_with_its_prefix() -> None:
    file = described(b"", "weights.safetensors")
    assert key_of("jobs/p/j/", file) == "jobs/p/j/weights.safetensors"
    for prefix in ("jobs/p/j", "../", "/jobs/"):
        with pytest.raises(InvalidArgument):
            key_of(prefix, file)
    assert key_of("files/p/f", described(b"")) == "files/p/f"
    with pytest.raises(InvalidArgument):
        key_of("files/../f", described(b""))


def test_a_revision_is_that_of_the_content_in_any_order() -> None:
    files = [described(b"a", "x"), described(b"b", "y")]
    assert revision_of(files) == revision_of(files[::-1])
    assert revision_of(files) != revision_of([described(b"b", "x"), described(b"a", "y")])
    lines = "".join(sorted(f"{file.path}\0{file.sha256}\n" for file in files))
    assert revision_of(files) == "rv_" + hashlib.sha256(lines.encode()).hexdigest()[:32]


async def test_bytes_go_up_and_down_unchanged(tmp_path: Path) -> None:
    store, content = make_store(tmp_path), bytes(range(256)) * 4096
    (tmp_path / "source").write_bytes(content)
    await store.upload(tmp_path / "source", "a/b", described(content))
    await store.download("a/b", described(content), tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == content


async def test_an_empty_file_is_a_file(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    (tmp_path / "source").write_bytes(b"")
    await store.upload(tmp_path / "source", "a/empty", described(b""))
    await store.download("a/empty", described(b""), tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b""


@pytest.mark.parametrize("announced", [b"other", b"conten", b"content and more"])
async def test_an_upload_of_other_bytes_stores_nothing(tmp_path: Path, announced: bytes) -> None:
    store = make_store(tmp_path)
    (tmp_path / "source").write_bytes(b"content")
    with pytest.raises(DataLoss) as refused:
        await store.upload(tmp_path / "source", "a/b", described(announced))
    assert refused.value.reason == "DATA_CORRUPT"
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("recorded", [b"other!!", b"conten", b"content and more"])
async def test_a_download_of_other_bytes_is_refused(tmp_path: Path, recorded: bytes) -> None:
    store = make_store(tmp_path)
    (tmp_path / "store" / "b").write_bytes(b"content")
    with pytest.raises(DataLoss):
        await store.download("b", described(recorded), tmp_path / "target")
    with pytest.raises(DataLoss):
        await store.download("missing", described(b"content"), tmp_path / "target")


async def test_deleting_what_is_gone_is_no_error(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    (tmp_path / "store" / "b").write_bytes(b"content")
    await store.delete(["b", "b", "c/d"])
    assert not (tmp_path / "store" / "b").exists()
    with pytest.raises(InvalidArgument):
        await store.delete(["../b"])


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
