"""The audit log over a real gateway: every call that may change something has its row, and what came of it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import MethodDescriptor
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from chassis.db.pool import transaction
from finemesh.files.v1 import file_service_pb2
from finemesh.models.v1 import model_service_pb2
from finemesh.tuning.v1 import tuning_service_pb2
from services.gateway.requests.audited_methods import asks_for_change
from tests.contract.gateway.world import CONVERSATION, World, gateway_world, refused
from tests.harness.polling import eventually
from tests.harness.raw_calls import raw_call

TUNING = "/finemesh.tuning.v1.TuningService"
FILES = "/finemesh.files.v1.FileService"
IMPORT = "/finemesh.models.v1.ModelService/ImportBaseModel"


async def entries(world: World) -> list[dict[str, Any]]:
    return [dict(row) for row in await world.pool.fetch("SELECT * FROM audit_log ORDER BY entry_id")]


async def deeds(world: World) -> list[tuple[str, str, str | None]]:
    return [(row["action"], row["resource"], row.get("outcome")) for row in await entries(world)]


def cancel(world: World, name: str) -> Any:
    request = tuning_service_pb2.CancelTuningJobRequest(name=name)
    return world.jobs.CancelTuningJob(request, metadata=world.bearer())


async def test_a_forwarded_change_says_who_did_what_and_what_came_of_it(world: World):
    request = tuning_service_pb2.CreateTuningJobRequest(request_id="r1")
    made = await world.jobs.CreateTuningJob(request, metadata=world.bearer())
    await cancel(world, made.tuning_job.name)
    async with refused("NOT_FOUND"):
        await cancel(world, "projects/p/tuningJobs/none")
    assert await deeds(world) == [
        (f"{TUNING}/CreateTuningJob", made.tuning_job.name, "OK"),
        (f"{TUNING}/CancelTuningJob", made.tuning_job.name, "OK"),
        (f"{TUNING}/CancelTuningJob", "projects/p/tuningJobs/none", "NOT_FOUND"),
    ]
    row = (await entries(world))[0]
    assert (row["organization_id"], row["project_id"]) == (world.acme.organization_id, world.acme.project_id)
    assert row["actor"].startswith("key_")
    assert row["roles"] == ["admin", "member", "operator"]
    assert len(row["trace_id"]) == 32


async def test_own_methods_have_one_row_each_also_when_they_are_refused(world: World):
    file = await world.upload(CONVERSATION)
    request = file_service_pb2.DeleteFileRequest(name=file.name)
    async with refused("NOT_FOUND"):
        await world.files.DeleteFile(request, metadata=world.bearer(world.other))
    await world.files.DeleteFile(request, metadata=world.bearer())
    async with refused("INVALID_FIELD"):
        await world.upload(CONVERSATION, parent=f"projects/{world.acme.project_id}", size_bytes=-1)
    assert await deeds(world) == [
        (f"{FILES}/UploadFile", file.name, "OK"),
        (f"{FILES}/DeleteFile", file.name, "NOT_FOUND"),
        (f"{FILES}/DeleteFile", file.name, "OK"),
        (f"{FILES}/UploadFile", f"projects/{world.acme.project_id}", "INVALID_FIELD"),
    ]


async def public_methods(world: World) -> list[MethodDescriptor]:
    """Of the services that the public door announces, other than gRPC's own."""
    asking = reflection_pb2_grpc.ServerReflectionStub(world.channel).ServerReflectionInfo(
        iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    )
    names = [service.name async for answer in asking for service in answer.list_services_response.service]
    services = [descriptor_pool.Default().FindServiceByName(name) for name in names if name.startswith("finemesh.")]
    return [method for service in services for method in service.methods]


async def empty_call(world: World, path: str, method: MethodDescriptor) -> None:
    """Most are refused, which is recorded as well as success."""
    metadata, channel = world.bearer(), cast(Any, world.channel)
    with contextlib.suppress(grpc.aio.AioRpcError):
        if method.client_streaming:
            await channel.stream_unary(path)(iter([b""]), metadata=metadata)
        elif method.server_streaming:
            await channel.unary_stream(path)(b"", metadata=metadata).read()
        else:
            await raw_call(world.channel, path)(b"", metadata=metadata)


async def unfinished(world: World) -> list[str]:
    return [row["action"] for row in await world.pool.fetch("SELECT action FROM audit_log WHERE outcome = ''")]


async def test_every_public_method_is_recorded_unless_its_name_says_that_it_reads(world: World):
    methods = {
        f"/{method.containing_service.full_name}/{method.name}": method for method in await public_methods(world)
    }
    assert len(methods) > 40
    reading = [path for path in methods if not asks_for_change(path)]
    print("read only:", *sorted(reading), sep="\n  ")
    for path, method in methods.items():
        if path not in reading:
            await empty_call(world, path, method)
    assert {action for action, _, _ in await deeds(world)} == methods.keys() - set(reading)
    # A change hidden behind a verb that reads would have one of these in its contract.
    for path in reading:
        assert "request_id" not in methods[path].input_type.fields_by_name, path
    # Of a stream that is refused the outcome may be written a moment after its caller has it.
    await eventually(lambda: unfinished(world), lambda found: found == [])


async def test_reads_and_strangers_have_none(world: World):
    await world.upload(CONVERSATION)
    await world.files.ListFiles(file_service_pb2.ListFilesRequest(), metadata=world.bearer())
    await world.jobs.QuoteTuningJob(tuning_service_pb2.QuoteTuningJobRequest(), metadata=world.bearer())
    async with refused("API_KEY_MISSING"):
        await world.files.DeleteFile(file_service_pb2.DeleteFileRequest(name="projects/p/files/f"))
    assert [action for action, _, _ in await deeds(world)] == [f"{FILES}/UploadFile"]


async def test_the_row_is_there_before_the_deed_and_stays_unknown_until_its_end(world: World):
    world.tuning.gate.clear()
    name = f"projects/{world.acme.project_id}/tuningJobs/ft-1"
    call = asyncio.ensure_future(cancel(world, name))
    await world.tuning.began.wait()
    assert await deeds(world) == [(f"{TUNING}/CancelTuningJob", name, "")]
    world.tuning.gate.set()
    await call
    assert await deeds(world) == [(f"{TUNING}/CancelTuningJob", name, "OK")]


async def test_who_leaves_in_the_middle_is_recorded_so(world: World):
    async def messages() -> AsyncIterator[model_service_pb2.ImportBaseModelRequest]:
        yield model_service_pb2.ImportBaseModelRequest(
            header=model_service_pb2.ImportBaseModelHeader(model_id="finemesh/new")
        )
        await asyncio.Event().wait()

    call = world.base_models.ImportBaseModel(messages(), metadata=world.bearer())
    await world.models.received.acquire()
    assert await deeds(world) == [(IMPORT, "finemesh/new", "")]
    call.cancel()
    ended = [(IMPORT, "finemesh/new", "CANCELLED")]
    # Nobody is told of the end of a call that nobody waits for.
    await eventually(lambda: deeds(world), lambda found: found == ended)


@pytest.mark.parametrize("content", [b"\xff\xff", b"\x0a\x03a\x00b"], ids=["no_message", "a_nul"])
async def test_what_the_gate_refuses_is_recorded_as_refused(world: World, content: bytes):
    with pytest.raises(grpc.aio.AioRpcError):
        await raw_call(world.channel, f"{FILES}/DeleteFile")(content, metadata=world.bearer())
    (row,) = await entries(world)
    assert (row["action"], row["outcome"]) == (f"{FILES}/DeleteFile", "INVALID_FIELD")


async def test_a_long_name_is_cut(world: World):
    async with refused("NOT_FOUND"):
        await cancel(world, "projects/" + "n" * 100_000)
    assert [len(row["resource"]) for row in await entries(world)] == [512]


async def test_nothing_is_forwarded_that_cannot_be_recorded(database_url: str, tls_dir: Path, tmp_path: Path):
    async with gateway_world(database_url, tls_dir, tmp_path, statement_timeout_s=0.5) as world:
        async with transaction(world.pool) as connection:
            await connection.execute("LOCK TABLE audit_log IN ACCESS EXCLUSIVE MODE")
            async with refused("DEPENDENCY_UNAVAILABLE", "UNAVAILABLE"):
                await cancel(world, "projects/p/tuningJobs/ft-1")
        assert not world.tuning.began.is_set()
        assert await deeds(world) == []


async def test_an_outcome_that_cannot_be_written_fails_no_call(world: World):
    await world.pool.execute("ALTER TABLE audit_log ADD CONSTRAINT no_end CHECK (outcome = '') NOT VALID")
    try:
        await cancel(world, "projects/p/tuningJobs/ft-1")
    finally:
        await world.pool.execute("ALTER TABLE audit_log DROP CONSTRAINT no_end")
    assert [outcome for _, _, outcome in await deeds(world)] == [""]
