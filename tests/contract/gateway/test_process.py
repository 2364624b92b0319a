"""The gateway as a process of its own: first key, memory under a large file, and a clean stop.

Slow on purpose: 200 MB through a real process is the only measure of its memory that means anything.
"""

import asyncio
import hashlib
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from finemesh.files.v1 import file_pb2, file_service_pb2
from finemesh.files.v1.file_service_pb2_grpc import FileServiceStub
from finemesh.identity.v1 import identity_service_pb2
from finemesh.identity.v1.identity_service_pb2_grpc import IdentityServiceStub
from tests.contract.gateway.world import CONVERSATION

if TYPE_CHECKING:
    from finemesh.files.v1.file_service_pb2_grpc import FileServiceAsyncStub

SIZE_BYTES = 200 * 1000 * 1000
GROWTH_BYTES_MAX = 64 * 1024 * 1024
START_S_MAX = 60
LINE = CONVERSATION.replace(b"Hi", b"Hi " * 600)
PIECE = LINE * (1_000_000 // len(LINE))


def environment(database_url: str, tls_dir: Path, folder: Path) -> dict[str, str]:
    return {
        **os.environ,
        "FINEMESH_GATEWAY_DATABASE_URL": database_url,
        "FINEMESH_TLS_DIR": str(tls_dir),
        "FINEMESH_ARTIFACTS_URL": f"file://{folder}/artifacts",
        "FINEMESH_GATEWAY_PORT_FILE": str(folder / "mesh.port"),
        "FINEMESH_GATEWAY_PUBLIC_PORT_FILE": str(folder / "public.port"),
        "FINEMESH_GATEWAY_HTTP_PORT_FILE": str(folder / "http.port"),
    }


async def bootstrap(env: dict[str, str], *arguments: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.gateway.bootstrap",
        *arguments,
        env=env,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


def peak_bytes(pid: int) -> int:
    """The largest resident size since the mark was last reset."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


def reset_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


async def upload(stub: "FileServiceAsyncStub", metadata: tuple, pieces: int) -> file_pb2.File:
    async def messages() -> AsyncIterator[file_service_pb2.UploadFileRequest]:
        yield file_service_pb2.UploadFileRequest(header=file_service_pb2.UploadFileHeader(display_name="large"))
        for _ in range(pieces):
            yield file_service_pb2.UploadFileRequest(chunk=PIECE)

    return (await stub.UploadFile(messages(), metadata=metadata)).file


async def download(stub: "FileServiceAsyncStub", metadata: tuple, name: str) -> str:
    digest = hashlib.sha256()
    request = file_service_pb2.DownloadFileRequest(name=name)
    async for part in stub.DownloadFile(request, metadata=metadata):
        digest.update(part.chunk)
    return digest.hexdigest()


async def test_a_process_from_first_key_to_clean_stop(database_url: str, tls_dir: Path, tmp_path: Path):
    env = environment(database_url, tls_dir, tmp_path)
    code, out, err = await bootstrap(env, "--slug", "demo")
    assert code == 0, err
    made = json.loads(out)
    assert set(made) == {"organization", "project", "slug", "api_key"}
    assert out.count("\n") == 1
    code, out, err = await bootstrap(env)
    assert (code, out) == (1, "")
    assert "--new-key" in err
    code, out, err = await bootstrap(env, "--slug", "demo", "--new-key")
    assert code == 0, err
    second = json.loads(out)
    assert second["project"] == made["project"]
    assert second["api_key"] != made["api_key"]

    gateway = await asyncio.create_subprocess_exec(sys.executable, "-m", "services.gateway.main", env=env)
    try:
        async with asyncio.timeout(START_S_MAX):
            while not (tmp_path / "mesh.port").exists():
                # Another process tells that it is up by this file.
                await asyncio.sleep(0.05)
        port = int((tmp_path / "public.port").read_text())
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            await serve_large_files(channel, gateway.pid, made, second)
        gateway.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(gateway.wait(), 20) == 0
    finally:
        if gateway.returncode is None:
            gateway.kill()
            await gateway.wait()


async def serve_large_files(channel: grpc.aio.Channel, pid: int, made: dict, second: dict) -> None:
    identities, files = IdentityServiceStub(channel), FileServiceStub(channel)
    for key in (made, second):
        metadata = (("authorization", f"Bearer {key['api_key']}"),)
        caller = await identities.GetCaller(identity_service_pb2.GetCallerRequest(), metadata=metadata)
        assert (caller.project.name, caller.organization.name) == (made["project"], made["organization"])
    # Once in small, so that what every first use loads is not counted as growth.
    small = await upload(files, metadata, 8)
    await download(files, metadata, small.name)
    reset_peak(pid)
    before_bytes = peak_bytes(pid)
    pieces = SIZE_BYTES // len(PIECE) + 1
    file = await upload(files, metadata, pieces)
    assert (file.state, file.size_bytes) == (file_pb2.FILE_STATE_READY, pieces * len(PIECE))
    assert file.line_count == pieces * PIECE.count(b"\n")
    uploaded_bytes = peak_bytes(pid)
    assert await download(files, metadata, file.name) == file.sha256
    downloaded_bytes = peak_bytes(pid)
    print(f"peak growth: upload {uploaded_bytes - before_bytes}, download {downloaded_bytes - before_bytes} bytes")
    assert uploaded_bytes - before_bytes < GROWTH_BYTES_MAX
    assert downloaded_bytes - before_bytes < GROWTH_BYTES_MAX
