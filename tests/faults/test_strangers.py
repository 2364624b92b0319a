"""Whoever has no key takes no place from those who have one: half-open calls, watches, headers that never end, silence.

One gateway for all of them, with real sockets and small limits, and a caller with a key who is served meanwhile.
"""

import asyncio
import contextlib
import json
import resource
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from finemesh.tuning.v1 import tuning_service_pb2
from tests.contract.gateway.world import World, gateway_world
from tests.harness import http2
from tests.harness.polling import eventually

CALLS_MAX = 50
SOCKETS_MAX = 40
REQUESTS_MAX = 3
# More than a gRPC server takes that counts calls before it asks who calls, or that lets them wait in its own line.
MANY = 4000
LIMITS: dict[str, Any] = {
    "concurrent_calls_max": CALLS_MAX,
    "streams_max": CALLS_MAX,
    "connection_calls_max": MANY,
    "stalled_reader_s_max": 0.5,
    "http_sockets_max": SOCKETS_MAX,
    "http_requests_per_key_max": REQUESTS_MAX,
    "http_header_s_max": 1,
    "http_body_s_max": 1,
}
WAIT_S_MAX = 30
JOB = tuning_service_pb2.GetTuningJobRequest(name="projects/p/tuningJobs/ft-1")
STREAMED = {"stream": True}
WATCH = "/finemesh.tuning.v1.TuningService/WatchTuningJob"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def world(database_url: str, tls_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    async with gateway_world(database_url, tls_dir, tmp_path_factory.mktemp("strangers"), **LIMITS) as world:
        yield world


async def assert_served(world: World) -> None:
    """At both doors, and whoever asks for health without a key."""
    async with asyncio.timeout(WAIT_S_MAX):
        answer = await world.jobs.GetTuningJob(JOB, metadata=world.bearer())
        assert answer.tuning_job.name == JOB.name
        async with grpc.aio.insecure_channel(f"127.0.0.1:{world.public_port}", [("stranger", 1)]) as channel:
            health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{world.http_port}") as http:
            models = await http.get("/v1/models", headers=dict(world.bearer()))
            assert models.status_code == 200
            assert (await http.get("/healthz")).status_code == 200


@pytest.mark.parametrize(
    "method", ["/finemesh.tuning.v1.TuningService/GetTuningJob", WATCH, "/finemesh.files.v1.FileService/UploadFile"]
)
async def test_half_open_calls_without_a_key_are_refused_before_their_request(world: World, method: str) -> None:
    async with http2.connected(world.public_port) as stranger, asyncio.timeout(WAIT_S_MAX):
        for _ in range(MANY):
            stranger.open(method)
        await assert_served(world)
        await stranger.ended(MANY)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("/grpc.health.v1.Health/Check", None),
        ("/grpc.health.v1.Health/Watch", b""),
        ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", None),
    ],
)
async def test_what_is_open_to_anybody_keeps_out_nobody(world: World, method: str, message: bytes | None) -> None:
    async with http2.connected(world.public_port) as stranger, asyncio.timeout(WAIT_S_MAX):
        for _ in range(MANY):
            stranger.open(method, message=message)
        await assert_served(world)
        # The oldest gave way to the last ones.
        await stranger.ended(MANY - world.settings.open_calls_per_connection_max)


async def test_a_stalled_reader_of_a_stream_is_cut_off(world: World) -> None:
    """With a key, and all places of the server: they are another key's when the time is over."""
    async with http2.connected(world.public_port, window=0) as stalled, asyncio.timeout(WAIT_S_MAX):
        begun = world.tuning.watches_ended

        async def ended() -> int:
            return world.tuning.watches_ended - begun

        streams = {stalled.open(WATCH, key=world.acme.secret, message=b"") for _ in range(CALLS_MAX)}
        await eventually(ended, lambda count: count == CALLS_MAX)
        watching = world.jobs.WatchTuningJob(
            tuning_service_pb2.WatchTuningJobRequest(), metadata=world.bearer(world.other)
        )
        assert await watching.read() is not grpc.aio.EOF
        watching.cancel()
        # Whoever reads on hears why it ended.
        for stream in streams:
            stalled.let(stream)
        assert await stalled.ended(CALLS_MAX) == streams


@contextlib.asynccontextmanager
async def socket_to(world: World) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", world.http_port)
    try:
        async with asyncio.timeout(WAIT_S_MAX):
            yield reader, writer
    finally:
        writer.transport.abort()


@pytest.mark.parametrize("piece", [b"a" * 65536, b"a: b\r\n" * 10000], ids=["one field", "many fields"])
async def test_a_header_that_never_ends_takes_no_memory(world: World, piece: bytes) -> None:
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with socket_to(world) as (_, writer):
        writer.write(b"GET /healthz HTTP/1.1\r\nx: ")
        with pytest.raises(ConnectionError):
            for _ in range((64 << 20) // len(piece)):
                writer.write(piece)
                await writer.drain()
        await assert_served(world)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 16 << 10


@pytest.mark.parametrize(
    ("fields", "limit"),
    [(b"x: " + b"a" * 40000 + b"\r\n", "http_header_bytes_max"), (b"a: b\r\n" * 200, "http_header_fields_max")],
)
async def test_a_header_over_the_limits_is_told_which(world: World, fields: bytes, limit: str) -> None:
    async with socket_to(world) as (reader, writer):
        writer.write(b"GET /healthz HTTP/1.1\r\nhost: x\r\n" + fields + b"\r\n")
        status, error = _answer(await reader.read())
        assert (status, error["code"]) == (431, "size_limit")
        assert limit in error["message"]


async def test_a_header_has_its_time(world: World) -> None:
    async with socket_to(world) as (reader, writer), socket_to(world) as (silent, _):
        writer.write(b"GET /healthz HTTP/1.1\r\n")
        status, error = _answer(await reader.read())
        assert (status, error["code"]) == (408, "deadline_too_short")
        assert await silent.read() == b""


async def test_a_body_that_nobody_reads_has_its_time(world: World) -> None:
    """The answer is here, and the stranger goes on sending."""
    async with socket_to(world) as (reader, writer), asyncio.TaskGroup() as group:
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n")

        async def trickle() -> None:
            while True:
                writer.write(b"x")
                await asyncio.sleep(0.1)

        trickling = group.create_task(trickle())
        answered = b""
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(1 << 16):
                answered += piece
        trickling.cancel()
        assert answered.startswith(b"HTTP/1.1 401 ")


async def test_a_slow_body_of_a_caller_has_its_time(world: World) -> None:
    async with socket_to(world) as (reader, writer):
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n"
            + f"authorization: Bearer {world.acme.secret}\r\n\r\nx".encode()
        )
        status, error = _answer(await reader.read())
        assert (status, error["code"]) == (504, "deadline_too_short")


async def test_one_key_has_a_part_of_the_requests(world: World) -> None:
    world.inference.gate.clear()
    url, body = f"http://127.0.0.1:{world.http_port}", {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
    async with httpx.AsyncClient(base_url=url, timeout=WAIT_S_MAX) as http, contextlib.AsyncExitStack() as answers:
        for _ in range(REQUESTS_MAX):
            asked = http.stream("POST", "/v1/chat/completions", headers=dict(world.bearer()), json=body | STREAMED)
            assert (await answers.enter_async_context(asked)).status_code == 200
        full = await http.get("/v1/models", headers=dict(world.bearer()))
        assert (full.status_code, full.json()["error"]["code"]) == (429, "concurrency_limit")
        assert "http_requests_per_key_max" in full.json()["error"]["message"]
        other = await http.get("/v1/models", headers=dict(world.bearer(world.other)))
        assert other.status_code == 200
        world.inference.gate.set()


async def test_silent_connections_give_way(world: World) -> None:
    async with contextlib.AsyncExitStack() as sockets:
        silent = [await sockets.enter_async_context(socket_to(world)) for _ in range(2 * SOCKETS_MAX)]
        await assert_served(world)
        for reader, _ in silent[:SOCKETS_MAX]:
            assert await reader.read() == b""


async def test_what_is_no_request_is_told_so_in_shape(world: World) -> None:
    async with socket_to(world) as (reader, writer):
        writer.write(b"\x16\x03\x01 a handshake of TLS\r\n\r\n")
        status, error = _answer(await reader.read())
        assert (status, error["code"]) == (400, "invalid_field")


def _answer(answered: bytes) -> tuple[int, dict[str, str]]:
    """The status and the error of a whole answer."""
    head, _, body = answered.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]
