"""Files over the public door: what is kept, what is refused, and that nothing half-made stays."""

import asyncio
import hashlib
import io
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chassis.identity import Caller, acting_as
from finemesh.artifacts.v1 import file_artifact_service_pb2
from finemesh.files.v1 import file_pb2, file_service_pb2
from tests.contract.gateway.world import CONVERSATION, World, add_tenant, gateway_world, refused
from tests.harness.polling import eventually

CONTENT = CONVERSATION * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def header(**fields: Any) -> file_service_pb2.UploadFileRequest:
    return file_service_pb2.UploadFileRequest(header=file_service_pb2.UploadFileHeader(**fields))


def chunk(content: bytes) -> file_service_pb2.UploadFileRequest:
    return file_service_pb2.UploadFileRequest(chunk=content)


async def get(world: World, name: str, **options: Any) -> file_pb2.File:
    request = file_service_pb2.GetFileRequest(name=name)
    return (await world.files.GetFile(request, metadata=world.bearer(**options))).file


async def download(world: World, name: str, offset_bytes: int = 0) -> bytes:
    request = file_service_pb2.DownloadFileRequest(name=name, offset_bytes=offset_bytes)
    parts = [part.chunk async for part in world.files.DownloadFile(request, metadata=world.bearer())]
    return b"".join(parts)


async def test_what_went_in_comes_out(world: World):
    file = await world.upload(CONTENT, display_name="train.jsonl", size_bytes=len(CONTENT), sha256=SHA256)
    assert file.name.startswith(f"projects/{world.acme.project_id}/files/file-")
    assert (file.state, file.format) == (file_pb2.FILE_STATE_READY, file_pb2.DATASET_FORMAT_CONVERSATION)
    assert (file.size_bytes, file.sha256, file.line_count) == (len(CONTENT), SHA256, 1000)
    assert (file.display_name, file.validation.valid) == ("train.jsonl", True)
    assert await get(world, file.name) == file
    assert await download(world, file.name) == CONTENT
    assert await download(world, file.name, 777) == CONTENT[777:]
    assert await download(world, file.name, len(CONTENT)) == b""
    for offset_bytes in (len(CONTENT) + 1, -1):
        async with refused("INVALID_FIELD", "OUT_OF_RANGE") as told:
            await download(world, file.name, offset_bytes)
        assert [violation.field for violation in told[0].violations] == ["offset_bytes"]
    assert await world.pool.fetchval("SELECT count(*) FROM removals") == 0


async def test_a_file_with_errors_is_kept_with_its_report(world: World):
    file = await world.upload(CONVERSATION + b'{"messages": 1}\n' * 150)
    assert file.state == file_pb2.FILE_STATE_INVALID
    report = (await get(world, file.name)).validation
    assert (report.valid, report.error_count, len(report.errors)) == (False, 150, 100)
    assert (report.errors[0].line, report.errors[0].path) == (2, "$.messages")
    assert report.errors[0].expectation and report.errors[0].found


async def test_a_file_says_what_it_makes_use_of(world: World):
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    answer = {"role": "assistant", "reasoning": "hm", "tool_calls": [call, call]}
    row = {"messages": [{"role": "user", "content": "q"}, answer], "weight": 0.5}
    file = await world.upload(json.dumps(row).encode())
    assert file.state == file_pb2.FILE_STATE_READY
    assert await get(world, file.name) == file
    used = {"tools", "parallel_tool_calls", "reasoning", "sample_weights"}
    assert {field.name for field, _ in file.features.ListFields()} == used


async def test_token_ids_come_as_parquet(world: World):
    content = io.BytesIO()
    pq.write_table(pa.table({"input_ids": [[1, 2], [3]]}), content)
    file = await world.upload(content.getvalue(), display_name="t.parquet")
    assert (file.state, file.format) == (file_pb2.FILE_STATE_READY, file_pb2.DATASET_FORMAT_TOKENS)
    assert file.line_count == 2
    assert await download(world, file.name) == content.getvalue()
    torn = await world.upload(content.getvalue()[:-4])
    assert (torn.state, [error.line for error in torn.validation.errors]) == (file_pb2.FILE_STATE_INVALID, [0])


async def test_an_empty_file_is_no_dataset(world: World):
    file = await world.upload(b"")
    assert file.state == file_pb2.FILE_STATE_INVALID
    assert [error.line for error in file.validation.errors] == [0]
    assert await download(world, file.name) == b""


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"size_bytes": len(CONTENT) - 1}, "DIGEST_MISMATCH"),
        ({"size_bytes": len(CONTENT) + 1}, "DIGEST_MISMATCH"),
        ({"sha256": "0" * 64}, "DIGEST_MISMATCH"),
        ({"sha256": SHA256.upper()}, "INVALID_FIELD"),
        ({"size_bytes": -1}, "INVALID_FIELD"),
        ({"size_bytes": 2**50}, "SIZE_LIMIT"),
        ({"request_id": "x" * 129}, "INVALID_FIELD"),
        ({"display_name": "a\0b"}, "INVALID_FIELD"),
        ({"purpose": 9}, "INVALID_FIELD"),
        ({"parent": "projects/proj_other"}, "NOT_FOUND"),
        ({"parent": "nonsense"}, "INVALID_FIELD"),
    ],
)
async def test_an_upload_that_is_not_what_it_says_leaves_nothing(world: World, fields, reason):
    async with refused(reason):
        await world.upload(CONTENT, **fields)
    await world.assert_nothing_was_kept()


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "INVALID_FIELD"),
        ([chunk(CONTENT)], "INVALID_FIELD"),
        ([header(), chunk(CONTENT), header()], "INVALID_FIELD"),
        ([header(), chunk(b"x" * (1 << 20) + b"x")], "SIZE_LIMIT"),
        ([header(), chunk(b"x" * (5 << 20))], "SIZE_LIMIT"),
    ],
)
async def test_a_stream_out_of_order_or_over_a_limit_leaves_nothing(world: World, messages, reason):
    async with refused(reason):
        await world.files.UploadFile(iter(messages), metadata=world.bearer())
    await world.assert_nothing_was_kept()


async def test_a_file_over_the_limit_leaves_nothing(database_url: str, tls_dir: Path, tmp_path: Path):
    async with gateway_world(database_url, tls_dir, tmp_path, file_size_bytes_max=100_000) as world:
        async with refused("SIZE_LIMIT", "RESOURCE_EXHAUSTED") as told:
            await world.upload(CONTENT * 10)
        assert told[0].metadata["limit"] == "file_size_bytes_max"
        await world.assert_nothing_was_kept()


async def test_an_upload_that_comes_no_further_leaves_nothing(database_url: str, tls_dir: Path, tmp_path: Path):
    async with gateway_world(database_url, tls_dir, tmp_path, upload_idle_s_max=1.0) as world:
        call = world.files.UploadFile(metadata=world.bearer())
        await call.write(header())
        await call.write(chunk(CONTENT))
        async with refused("DEADLINE_TOO_SHORT"):
            await call
        await world.assert_nothing_was_kept()


@pytest.mark.parametrize("how", ["cancel", "close", "deadline"])
async def test_a_broken_stream_leaves_nothing(world: World, how: str):
    """Many times over: a server that takes the break for the end of the stream does so only now and then."""
    for chunks in range(24):
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{world.public_port}")
        call: Any = channel.stream_unary(
            "/finemesh.files.v1.FileService/UploadFile",
            request_serializer=file_service_pb2.UploadFileRequest.SerializeToString,
        )(metadata=world.bearer(), timeout=0.05 if how == "deadline" else None)
        with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError, asyncio.InvalidStateError)):
            await call.write(header())
            for _ in range(chunks):
                await call.write(chunk(CONTENT))
            if how == "cancel":
                call.cancel()
            if how == "close":
                await channel.close()
            await call
        await channel.close()
    # Calls that were broken off may still be on their way into the handler, which tells nobody here.
    await asyncio.sleep(0.3)
    await world.assert_nothing_was_kept()


async def test_the_same_request_id_returns_the_same_file(world: World):
    fields: dict[str, Any] = {"request_id": "r1", "sha256": SHA256}
    first = await world.upload(CONTENT, **fields)
    assert await world.upload(CONTENT, **fields) == first
    assert await world.upload(CONTENT, parent=f"projects/{world.acme.project_id}", **fields) == first
    async with refused("REQUEST_ID_REUSED", "ALREADY_EXISTS"):
        await world.upload(CONTENT, request_id="r1")
    assert (await world.upload(CONTENT, tenant=world.other, **fields)).name != first.name
    assert len(world.stored()) == 2


async def test_two_uploads_at_once_with_one_request_id_make_one_file(world: World):
    files = await asyncio.gather(*(world.upload(CONTENT, request_id="r1") for _ in range(4)))
    assert len({file.name for file in files}) == 1
    assert len(world.stored()) == 1
    assert await world.pool.fetchval("SELECT count(*) FROM removals") == 0


async def test_files_are_listed_newest_first_by_pages(world: World):
    names = [(await world.upload(CONVERSATION, display_name=str(number))).name for number in range(5)]
    await world.upload(CONVERSATION, tenant=world.other)
    seen, token = [], ""
    for _ in range(3):
        request = file_service_pb2.ListFilesRequest(page_size=2, page_token=token)
        page = await world.files.ListFiles(request, metadata=world.bearer())
        seen += [file.name for file in page.files]
        token = page.next_page_token
    assert seen == names[::-1]
    assert token == ""
    async with refused("INVALID_FIELD"):
        await world.files.ListFiles(file_service_pb2.ListFilesRequest(page_token="x"), metadata=world.bearer())


async def test_a_foreign_or_deleted_file_is_not_there(world: World):
    file = await world.upload(CONVERSATION)
    async with refused("NOT_FOUND", "NOT_FOUND"):
        await get(world, file.name, tenant=world.other)
    request = file_service_pb2.DeleteFileRequest(name=file.name)
    async with refused("NOT_FOUND"):
        await world.files.DeleteFile(request, metadata=world.bearer(world.other))
    async with refused("NOT_FOUND"):
        await get(world, file.name.replace("file-", "file-0"))
    async with refused("INVALID_FIELD"):
        await get(world, "projects/x/files/../../etc/passwd")
    await world.files.DeleteFile(request, metadata=world.bearer())
    for call in (get(world, file.name), download(world, file.name)):
        async with refused("NOT_FOUND"):
            await call
    async with refused("NOT_FOUND"):
        await world.files.DeleteFile(request, metadata=world.bearer())


async def storage_of(world: World, tenant: Any = None) -> file_service_pb2.Storage:
    answer = await world.files.GetStorage(file_service_pb2.GetStorageRequest(), metadata=world.bearer(tenant))
    return answer.storage


async def test_a_project_has_a_quota_that_an_operator_sets(world: World):
    file = await world.upload(CONTENT)
    size_bytes_max, file_count_max = world.settings.project_bytes_max, world.settings.project_files_max
    whole = file_service_pb2.Storage(
        size_bytes=len(CONTENT), size_bytes_max=size_bytes_max, file_count=1, file_count_max=file_count_max
    )
    assert await storage_of(world) == whole
    request = file_service_pb2.SetStorageQuotaRequest(
        parent=f"projects/{world.acme.project_id}", size_bytes_max=2 * len(CONTENT) - 1
    )
    # Also of another organization's project.
    operator = world.bearer(world.other)
    answer = await world.files.SetStorageQuota(request, metadata=operator)
    assert (answer.storage.size_bytes_max, answer.storage.file_count_max) == (2 * len(CONTENT) - 1, file_count_max)
    for announced_bytes in (len(CONTENT), 0):
        async with refused("QUOTA_EXCEEDED", "RESOURCE_EXHAUSTED") as told:
            await world.upload(CONTENT, size_bytes=announced_bytes)
        assert told[0].metadata["limit"] == "project_bytes_max"
        assert told[0].metadata["size_bytes_max"] == str(2 * len(CONTENT) - 1)
    await world.upload(CONTENT, tenant=world.other)
    await world.files.DeleteFile(file_service_pb2.DeleteFileRequest(name=file.name), metadata=world.bearer())
    # At once, although the bytes may still be there.
    assert (await storage_of(world)).size_bytes == 0
    await world.upload(CONTENT, size_bytes=len(CONTENT))
    await world.files.SetStorageQuota(file_service_pb2.SetStorageQuotaRequest(parent=request.parent), metadata=operator)
    assert await storage_of(world) == whole


async def test_only_an_operator_sets_a_quota_and_strangers_learn_nothing(world: World):
    member = await add_tenant(world.pool, "member", roles=("member", "admin"))
    request = file_service_pb2.SetStorageQuotaRequest(parent=f"projects/{member.project_id}", file_count_max=1)
    async with refused("ROLE_MISSING"):
        await world.files.SetStorageQuota(request, metadata=world.bearer(member))
    for wrong in ({"parent": "projects/none"}, {"parent": request.parent, "size_bytes_max": -1}, {"parent": "x"}):
        async with refused("NOT_FOUND" if wrong == {"parent": "projects/none"} else "INVALID_FIELD"):
            message = file_service_pb2.SetStorageQuotaRequest(**wrong)
            await world.files.SetStorageQuota(message, metadata=world.bearer())
    async with refused("NOT_FOUND"):
        foreign = file_service_pb2.GetStorageRequest(parent=request.parent)
        await world.files.GetStorage(foreign, metadata=world.bearer())


async def test_deleted_bytes_go_after_their_retention(database_url: str, tls_dir: Path, tmp_path: Path):
    timing = {"deleted_file_retention_s": 0, "sweep_interval_s": 0.1}
    async with gateway_world(database_url, tls_dir, tmp_path, **timing) as world:
        file = await world.upload(CONVERSATION)
        kept = await world.upload(CONVERSATION)
        await world.files.DeleteFile(file_service_pb2.DeleteFileRequest(name=file.name), metadata=world.bearer())
        # What a killed process leaves: a note of an upload, and its staged bytes.
        key = f"files/{world.acme.project_id}/file-killed"
        (world.artifacts / f"{key}#1").write_bytes(b"half")
        past = datetime.now(UTC) - timedelta(seconds=1)
        await world.pool.execute("INSERT INTO removals (artifact_key, due_time) VALUES ($1, $2)", key, past)
        await world.removals_become(0)
        assert [path.name for path in world.stored()] == [kept.name.rsplit("/", 1)[1]]


async def test_deleted_bytes_stay_as_long_as_a_job_reads_them(database_url: str, tls_dir: Path, tmp_path: Path):
    timing = {"deleted_file_retention_s": 0, "deleted_file_recheck_s": 0.2, "sweep_interval_s": 0.1}
    async with gateway_world(database_url, tls_dir, tmp_path, **timing) as world:
        read, unread = [await world.upload(CONVERSATION) for _ in range(2)]
        key = f"files/{world.acme.project_id}/{read.name.rsplit('/', 1)[1]}"
        world.file_use.used.add(key)
        for file in (read, unread):
            await world.files.DeleteFile(file_service_pb2.DeleteFileRequest(name=file.name), metadata=world.bearer())
        await world.removals_become(1)
        world.file_use.asked.clear()
        await eventually(lambda: asyncio.sleep(0, key in world.file_use.asked), bool)
        assert [path.name for path in world.stored()] == [key.rsplit("/", 1)[1]]
        # The job has ended.
        world.file_use.used.clear()
        await world.removals_become(0)
        assert world.stored() == []


async def test_changed_bytes_are_noticed(world: World):
    file = await world.upload(CONVERSATION)
    (path,) = world.stored()
    path.write_bytes(CONVERSATION.replace(b"Hi", b"Ha"))
    async with refused("DATA_CORRUPT", "DATA_LOSS"):
        await download(world, file.name)
    path.unlink()
    async with refused("DATA_CORRUPT", "DATA_LOSS"):
        await download(world, file.name)


async def test_other_services_learn_where_a_sound_file_lies(world: World):
    file = await world.upload(CONTENT)
    broken = await world.upload(b"{}\n")
    resolve = world.file_artifacts.ResolveFile
    answer = await resolve(file_artifact_service_pb2.ResolveFileRequest(name=file.name))
    assert (answer.format, answer.line_count) == ("conversation", 1000)
    assert [(part.path, part.sha256, part.size_bytes) for part in answer.artifact.files] == [("", SHA256, len(CONTENT))]
    assert (world.artifacts / answer.artifact.key).read_bytes() == CONTENT
    with pytest.raises(Exception, match="FILE_NOT_READY") as told:
        await resolve(file_artifact_service_pb2.ResolveFileRequest(name=broken.name))
    problem: Any = told.value
    assert problem.violations[0].field == "line 1: $"
    stranger = Caller(service="", tenant=world.other.project_id, account="o", subject="k")
    with acting_as(stranger), pytest.raises(Exception, match="NOT_FOUND"):
        await resolve(file_artifact_service_pb2.ResolveFileRequest(name=file.name))
    owner = Caller(service="", tenant=world.acme.project_id, account="o", subject="k")
    with acting_as(owner):
        await resolve(file_artifact_service_pb2.ResolveFileRequest(name=file.name))


async def test_other_services_learn_how_much_work_a_file_is(world: World):
    content = io.BytesIO()
    pq.write_table(pa.table({"input_ids": pa.array([[7]] * 100_000, pa.list_(pa.int32()))}), content)
    for dataset, work_bytes in ((content.getvalue(), 100_000 * 256), (CONVERSATION, 256)):
        file = await world.upload(dataset)
        answer = await world.file_artifacts.ResolveFile(file_artifact_service_pb2.ResolveFileRequest(name=file.name))
        assert [part.work_bytes for part in answer.artifact.files] == [work_bytes]


async def test_uploads_in_flight_are_bounded(database_url: str, tls_dir: Path, tmp_path: Path):
    async with gateway_world(database_url, tls_dir, tmp_path, uploads_max=1) as world:
        call = world.files.UploadFile(metadata=world.bearer())
        await call.write(header())
        await call.write(chunk(CONVERSATION))
        await world.removals_become(1)
        async with refused("CAPACITY_EXHAUSTED", "RESOURCE_EXHAUSTED") as told:
            await world.upload(CONVERSATION)
        assert told[0].retry_after_s == 1
        await call.done_writing()
        await call
        await world.upload(CONVERSATION)


def uploaded(size_bytes: int) -> AsyncIterator[file_service_pb2.UploadFileRequest]:
    async def messages() -> AsyncIterator[file_service_pb2.UploadFileRequest]:
        yield header()
        piece = chunk(CONVERSATION * (500_000 // len(CONVERSATION)))
        for _ in range(size_bytes // len(piece.chunk)):
            yield piece

    return messages()
