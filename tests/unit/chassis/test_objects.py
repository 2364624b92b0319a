"""What may be a key, and what happens to bytes that are not those that were recorded."""

import asyncio
import hashlib
import http.server
import os
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from chassis.clock import SystemClock
from chassis.errors import DataLoss, InvalidArgument, Unavailable
from chassis.objects import object_store
from chassis.objects.object_keys import checked_path, key_of
from chassis.objects.object_store import PART_BYTES_MIN, ObjectMissing, ObjectStore
from chassis.objects.transfer import FileTransfer


@dataclass(frozen=True, kw_only=True)
class Entry:
    path: str
    size_bytes: int
    sha256: str


def make_client(folder: Path) -> ObjectStore:
    return ObjectStore((folder / "store").as_uri(), part_bytes=64 * 1024, parts_in_flight_max=2)


def make_store(folder: Path) -> FileTransfer:
    return FileTransfer(make_client(folder), SystemClock(), chunk_bytes=64 * 1024, concurrent_max=2, attempts_max=2)


def described(content: bytes, path: str = "") -> Entry:
    return Entry(path=path, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


async def chunks_of(*chunks: bytes | Exception) -> AsyncIterator[bytes]:
    for chunk in chunks:
        if isinstance(chunk, Exception):
            raise chunk
        yield chunk


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


async def test_a_whole_folder_goes_up_and_down(tmp_path: Path) -> None:
    store, files = make_store(tmp_path), [described(b"one", "one"), described(b"two", "sub/two")]
    (tmp_path / "up" / "sub").mkdir(parents=True)
    (tmp_path / "up" / "one").write_bytes(b"one")
    (tmp_path / "up" / "sub" / "two").write_bytes(b"two")
    await store.upload_all(tmp_path / "up", "m/", files)
    await store.download_all("m/", files, tmp_path / "down")
    assert (tmp_path / "down" / "sub" / "two").read_bytes() == b"two"
    with pytest.raises(DataLoss):
        await store.download_all("m/", [*files, described(b"", "missing")], tmp_path / "down")


async def test_a_stream_is_read_from_any_offset_in_bounded_chunks(tmp_path: Path) -> None:
    client, content = make_client(tmp_path), bytes(range(256)) * 1024
    await client.put("a", chunks_of(content[:1000], content[1000:]))
    for offset in (0, 1, 100_000, len(content) - 1):
        chunks = [chunk async for chunk in client.read("a", offset_bytes=offset, chunk_bytes_max=5000)]
        assert b"".join(chunks) == content[offset:]
        assert max(map(len, chunks)) <= 5000
    with pytest.raises(ObjectMissing):
        await anext(client.read("b", chunk_bytes_max=5000))


async def test_a_stream_that_breaks_stores_nothing_and_raises_its_own_error(tmp_path: Path) -> None:
    client = make_client(tmp_path)
    with pytest.raises(ConnectionResetError):
        await client.put("a", chunks_of(b"x" * 100_000, ConnectionResetError()))
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []


async def test_a_synced_stream_is_on_the_disk_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    monkeypatch.setattr(object_store, "_WRITE_BACK_BYTES", 2 * PART_BYTES_MIN)

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(8):
            # What is written while more comes is seen under its staged name.
            await asyncio.sleep(0.02)
            yield bytes(PART_BYTES_MIN)

    store = make_client(tmp_path)
    await store.put("a/b", chunks_of(b"x"))
    assert synced == []
    await store.put("a/b", chunks(), synced=True)
    root = tmp_path / "store"
    assert {str(root / "a" / "b"), str(root / "a"), str(root)} <= set(synced)
    assert any("#" in path for path in synced)
    assert (root / "a" / "b").stat().st_size == 8 * PART_BYTES_MIN


async def test_what_a_killed_upload_left_goes_with_the_object(tmp_path: Path) -> None:
    client = make_client(tmp_path)
    (tmp_path / "store" / "a#1").write_bytes(b"half")
    (tmp_path / "store" / "ab#1").write_bytes(b"another's")
    await client.remove("a")
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["ab#1"]


async def test_a_store_that_is_away_is_unavailable(tmp_path: Path) -> None:
    client = make_client(tmp_path)
    await asyncio.to_thread((tmp_path / "store" / "a").mkdir)
    (tmp_path / "store" / "file").write_bytes(b"")
    with pytest.raises(Unavailable) as refused:
        await client.put("file/below", chunks_of(b"x"))
    assert refused.value.reason == "DEPENDENCY_UNAVAILABLE"


class _Bucket(http.server.BaseHTTPRequestHandler):
    """As much of S3 as an upload needs; `asked` notes what came."""

    asked: ClassVar[list[str]] = []
    protocol_version = "HTTP/1.1"

    def _answer(self, code: int, body: str = "") -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.asked.append(f"{self.command} {self.path}")
        self.send_response(code)
        self.send_header("ETag", "e")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def do_POST(self) -> None:
        self._answer(
            200,
            "<InitiateMultipartUploadResult><Bucket>b</Bucket><Key>k</Key><UploadId>u1</UploadId>"
            "</InitiateMultipartUploadResult>",
        )

    def do_PUT(self) -> None:
        self._answer(200)

    def do_DELETE(self) -> None:
        self._answer(204)

    def log_message(self, *args: object) -> None:
        """Says nothing."""


@pytest.mark.parametrize("by", ["its caller", "its chunks"])
async def test_an_upload_that_is_given_up_leaves_no_parts_in_a_bucket(monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Bucket)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    values = {"ENDPOINT": f"http://127.0.0.1:{server.server_port}", "ALLOW_HTTP": "true", "REGION": "r"}
    for name, value in {**values, "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    _Bucket.asked.clear()
    waiting = asyncio.Event()

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield bytes(PART_BYTES_MIN)
        waiting.set()
        if by == "its chunks":
            raise ZeroDivisionError
        await asyncio.Event().wait()

    store = ObjectStore("s3://bucket", part_bytes=PART_BYTES_MIN, parts_in_flight_max=1)
    upload = asyncio.create_task(store.put("k", chunks()))
    await waiting.wait()
    if by == "its caller":
        upload.cancel()
    with pytest.raises((asyncio.CancelledError, ZeroDivisionError)):
        await upload
    server.shutdown()
    server.server_close()
    assert any(each.startswith("PUT") for each in _Bucket.asked)
    assert [each for each in _Bucket.asked if each.startswith("DELETE")] == ["DELETE /bucket/k?uploadId=u1"]
