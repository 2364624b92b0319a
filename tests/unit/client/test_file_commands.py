"""`finemesh files`: an upload's bytes are compared with the answer, and what a project stores is shown and bounded."""

import asyncio
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from typer.testing import CliRunner

from finemesh.files.v1 import file_pb2, file_service_pb2, file_service_pb2_grpc
from finemesh_client import Client, DataLoss, RateLimited
from finemesh_client.cli.main import app
from tests.unit.client.conftest import Serve

NAME = "projects/acme/files/file-1"
CONTENT = b"0123456789" * 300_000
STORAGE = file_service_pb2.Storage(
    size_bytes=1_500_000, size_bytes_max=2_000_000_000, file_count=3, file_count_max=10_000
)


class Mesh(file_service_pb2_grpc.FileServiceServicer):
    """Stores what comes, or other bytes when told so."""

    def __init__(self) -> None:
        self.header = file_service_pb2.UploadFileHeader()
        self.stored = b""
        self.flipped = b""
        self.quota = file_service_pb2.SetStorageQuotaRequest()
        self.is_full = False

    def UploadFile(
        self, request_iterator: Iterator[file_service_pb2.UploadFileRequest], context: grpc.ServicerContext
    ) -> file_service_pb2.UploadFileResponse:
        self.header = next(request_iterator).header
        if self.is_full:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the quota is used up")
        self.stored = b"".join(request.chunk for request in request_iterator) + self.flipped
        file = file_pb2.File(name=NAME, sha256=hashlib.sha256(self.stored).hexdigest())
        return file_service_pb2.UploadFileResponse(file=file)

    def GetStorage(
        self, request: file_service_pb2.GetStorageRequest, context: object
    ) -> file_service_pb2.GetStorageResponse:
        return file_service_pb2.GetStorageResponse(storage=STORAGE)

    def SetStorageQuota(
        self, request: file_service_pb2.SetStorageQuotaRequest, context: object
    ) -> file_service_pb2.SetStorageQuotaResponse:
        self.quota = request
        return file_service_pb2.SetStorageQuotaResponse(storage=STORAGE)


@pytest.fixture
def mesh(serve: Serve) -> Mesh:
    mesh = Mesh()
    serve(mesh, file_service_pb2_grpc.add_FileServiceServicer_to_server)
    return mesh


def test_an_upload_is_read_once_and_its_answer_is_compared(mesh: Mesh, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(CONTENT)
    sent: list[int] = []

    async def upload(request_id: str | None = None) -> None:
        async with Client() as client:
            await client.files.upload(path, request_id=request_id, on_bytes=sent.append)

    asyncio.run(upload())
    assert (mesh.stored, sum(sent)) == (CONTENT, len(CONTENT))
    assert (mesh.header.size_bytes, mesh.header.sha256) == (len(CONTENT), "")
    # A request of one's own is told apart by its bytes.
    asyncio.run(upload("mine"))
    assert mesh.header.sha256 == hashlib.sha256(CONTENT).hexdigest()
    mesh.flipped = b"!"
    with pytest.raises(DataLoss, match=NAME):
        asyncio.run(upload())


def test_a_refusal_that_comes_while_bytes_are_sent_is_told(mesh: Mesh, tmp_path: Path) -> None:
    """Many times over: gRPC loses the refusal only now and then."""
    path = tmp_path / "train.jsonl"
    path.write_bytes(CONTENT)
    mesh.is_full = True

    async def upload() -> None:
        async with Client() as client:
            with pytest.raises(RateLimited, match="the quota is used up"):
                await client.files.upload(path)

    async def all_at_once() -> None:
        await asyncio.gather(*(upload() for _ in range(16)))

    asyncio.run(all_at_once())


def test_what_is_stored_is_shown_with_what_may_be(mesh: Mesh) -> None:
    shown = CliRunner().invoke(app, ["files", "usage"])
    assert shown.exit_code == 0, shown.output
    assert "1.5 MB of 2.0 GB" in shown.output
    assert "3 of 10,000" in shown.output


def test_a_quota_that_is_not_given_is_not_set(mesh: Mesh) -> None:
    done = CliRunner().invoke(app, ["files", "quota", "projects/acme", "--bytes", "0", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["file_count"]
    assert (mesh.quota.parent, mesh.quota.size_bytes_max) == ("projects/acme", 0)
    assert mesh.quota.HasField("size_bytes_max") and not mesh.quota.HasField("file_count_max")
