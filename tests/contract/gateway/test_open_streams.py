"""Streams that are open when their key is revoked: watches, generations by gRPC and HTTP, uploads and downloads."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx

from chassis import errors
from finemesh.files.v1 import file_service_pb2
from finemesh.identity.v1 import identity_pb2, identity_service_pb2
from finemesh.inference.v1 import inference_service_pb2
from finemesh.models.v1 import model_service_pb2
from finemesh.tuning.v1 import tuning_service_pb2
from tests.contract.gateway.world import CONVERSATION, World, gateway_world

WITHIN_S = 20.0
PARTS = {"chunk_bytes_max": 65536}


async def new_key(world: World) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The name of another key of the project, and the metadata that shows it."""
    request = identity_service_pb2.CreateApiKeyRequest(roles=[identity_pb2.ROLE_ADMIN])
    made = await world.identities.CreateApiKey(request, metadata=world.bearer())
    return made.key.name, (("authorization", f"Bearer {made.secret}"),)


def watch(world: World, metadata: Any) -> Any:
    return world.jobs.WatchTuningJob(tuning_service_pb2.WatchTuningJobRequest(), metadata=metadata)


async def end_of(call: Any) -> errors.DomainError:
    """How a stream of answers ends; what it still says before is of no interest."""
    try:
        async with asyncio.timeout(WITHIN_S):
            while await call.read() is not grpc.aio.EOF:
                pass
    except grpc.aio.AioRpcError as error:
        return errors.unpack(error)
    raise AssertionError("the stream ended well")


async def answer_of(call: Any) -> errors.DomainError:
    """How a call that sends a stream ends."""
    try:
        async with asyncio.timeout(WITHIN_S):
            await call
    except grpc.aio.AioRpcError as error:
        return errors.unpack(error)
    raise AssertionError("the call was answered")


async def test_open_streams_end_when_their_key_is_revoked(database_url, tls_dir, tmp_path):
    # By the revocation itself: the next look would come long after this test.
    async with gateway_world(database_url, tls_dir, tmp_path, stream_key_check_s=3600) as world:
        name, metadata = await new_key(world)
        _, kept = await new_key(world)
        world.inference.gate.clear()
        watching, generating, going_on = (
            watch(world, metadata),
            world.generations.StreamChat(inference_service_pb2.StreamChatRequest(model="m"), metadata=metadata),
            watch(world, kept),
        )
        never: asyncio.Event = asyncio.Event()

        async def model() -> AsyncIterator[model_service_pb2.ImportBaseModelRequest]:
            yield model_service_pb2.ImportBaseModelRequest()
            await never.wait()

        importing = world.base_models.ImportBaseModel(model(), metadata=metadata)
        for call in (watching, generating, going_on):
            await call.read()
        await world.models.received.acquire()
        async with (
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{world.http_port}", timeout=WITHIN_S) as http,
            http.stream(
                "POST",
                "/v1/chat/completions",
                headers=dict(metadata),
                json={"model": "m", "stream": True, "messages": [{"role": "user", "content": "Hi"}]},
            ) as served,
        ):
            lines = served.aiter_lines()
            await anext(lines)
            revoke = identity_service_pb2.RevokeApiKeyRequest(name=name)
            await world.identities.RevokeApiKey(revoke, metadata=world.bearer())
            for ended in (await end_of(watching), await end_of(generating), await answer_of(importing)):
                assert (ended.code, ended.reason) == (grpc.StatusCode.UNAUTHENTICATED, "API_KEY_REVOKED")
            said = [line.removeprefix("data: ") async for line in lines if line]
            assert json.loads(said[-1])["error"]["code"] == "invalid_api_key"
            assert "revoked" in said[-1]
        assert await world.models.ends.get() == "cancelled"
        await world.tuning.watch_cancelled.wait()
        await going_on.read()
        going_on.cancel()


async def test_a_revocation_elsewhere_ends_streams_at_the_next_look(database_url, tls_dir, tmp_path):
    async with gateway_world(database_url, tls_dir, tmp_path, stream_key_check_s=0.1) as world:
        name, metadata = await new_key(world)
        watching = watch(world, metadata)
        await watching.read()
        await world.pool.execute("UPDATE api_keys SET revoke_time = now() WHERE key_id = $1", name.rpartition("/")[2])
        assert (await end_of(watching)).reason == "API_KEY_REVOKED"


async def test_a_revoked_key_uploads_and_downloads_no_further(database_url, tls_dir, tmp_path):
    async with gateway_world(database_url, tls_dir, tmp_path, stream_key_check_s=3600, **PARTS) as world:
        name, metadata = await new_key(world)
        # More than the buffers on the way hold.
        stored = await world.upload(CONVERSATION * 100_000)
        reading = world.files.DownloadFile(file_service_pb2.DownloadFileRequest(name=stored.name), metadata=metadata)
        await reading.read()
        revoked = asyncio.Event()

        async def content() -> AsyncIterator[file_service_pb2.UploadFileRequest]:
            yield file_service_pb2.UploadFileRequest(header=file_service_pb2.UploadFileHeader())
            yield file_service_pb2.UploadFileRequest(chunk=CONVERSATION)
            await revoked.wait()
            yield file_service_pb2.UploadFileRequest(chunk=CONVERSATION)

        writing = world.files.UploadFile(content(), metadata=metadata)
        ending = asyncio.create_task(answer_of(writing))
        # So far it came, so it is not refused for its key at the door.
        await world.removals_become(1)
        revoke = identity_service_pb2.RevokeApiKeyRequest(name=name)
        await world.identities.RevokeApiKey(revoke, metadata=world.bearer())
        assert (await end_of(reading)).reason == "API_KEY_REVOKED"
        revoked.set()
        assert (await ending).reason == "API_KEY_REVOKED"
