"""One key misbehaves, and another organization is served within a bound all the same.

The bounds are generous: they are for a busy machine, and what they exclude took many times as long.
"""

import asyncio
import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pyarrow as pa
import pyarrow.parquet as pq

from chassis import errors
from finemesh.files.v1 import file_pb2, file_service_pb2
from tests.contract.gateway.world import CONVERSATION, World, gateway_world
from tests.harness.polling import eventually

SERVED_S_MAX = 8.0
ROWS = 600_000
# More than is checked without a process.
CONTENT = CONVERSATION * 2000


def many_rows_in_few_bytes(rows: int = ROWS) -> bytes:
    content = io.BytesIO()
    table = pa.table({"input_ids": pa.array([[7]] * rows, pa.list_(pa.int32()))})
    pq.write_table(table, content, compression="zstd", row_group_size=rows)
    assert len(content.getvalue()) < 10_000
    return content.getvalue()


async def reason_of(call: Any) -> str:
    """Why the call failed; empty when it did not, or when gRPC's client knows only that its write met the call's end.

    The server's status is lost to it then.
    """
    try:
        await call
    except grpc.aio.AioRpcError as error:
        is_lost = error.details() == "Internal error from Core" or "SendMessageOperation" in (error.details() or "")
        return "" if is_lost else errors.unpack(error).reason
    return ""


async def test_files_of_few_bytes_and_many_rows_hold_up_nobody(database_url: str, tls_dir: Path, tmp_path: Path):
    bomb = many_rows_in_few_bytes()
    # As many as eight keys of one organization would send.
    slots = {"uploads_per_key_max": 8}
    async with gateway_world(database_url, tls_dir, tmp_path, **slots) as world:
        bombs = [asyncio.create_task(reason_of(world.upload(bomb))) for _ in range(8)]
        await eventually(lambda: world.pool.fetchval("SELECT count(*) FROM removals"), lambda noted: noted >= 6)
        async with asyncio.timeout(SERVED_S_MAX):
            for content in (CONTENT, many_rows_in_few_bytes(10)):
                file = await world.upload(content, tenant=world.other)
                assert file.state == file_pb2.FILE_STATE_READY
        assert set(await asyncio.gather(*bombs)) == {""}


async def test_empty_chunks_hold_no_slot(database_url: str, tls_dir: Path, tmp_path: Path):
    async with gateway_world(database_url, tls_dir, tmp_path, upload_idle_s_max=1.0) as world:
        # One more than there are slots in all: the first one that is told so finds all of the key's taken.
        pings = [asyncio.create_task(reason_of(endless(world, bytes(number % 2)))) for number in range(17)]
        await asyncio.wait(pings, return_when=asyncio.FIRST_COMPLETED)
        async with asyncio.timeout(SERVED_S_MAX):
            file = await world.upload(CONTENT, tenant=world.other)
            assert file.state == file_pb2.FILE_STATE_READY
            told = await asyncio.gather(*pings)
        assert {"CAPACITY_EXHAUSTED"} <= set(told) <= {"DEADLINE_TOO_SHORT", "CAPACITY_EXHAUSTED", ""}


def endless(world: World, chunk: bytes) -> Any:
    async def messages() -> AsyncIterator[file_service_pb2.UploadFileRequest]:
        yield file_service_pb2.UploadFileRequest(header=file_service_pb2.UploadFileHeader())
        while True:
            yield file_service_pb2.UploadFileRequest(chunk=chunk)
            await asyncio.sleep(0.05)

    return world.files.UploadFile(messages(), metadata=world.bearer())
