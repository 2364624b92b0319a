"""A name means one thing: base model, tuned model or endpoint, whichever came first."""

from __future__ import annotations

from pathlib import Path

import pytest

from chassis.errors import AlreadyExists
from chassis.rpc.channel import open_channel
from finemesh.artifacts.v1 import model_artifact_service_pb2 as artifacts
from finemesh.artifacts.v1.model_artifact_service_pb2_grpc import ModelArtifactServiceStub
from finemesh.endpoints.v1 import endpoint_service_pb2 as endpoints
from finemesh.endpoints.v1.endpoint_service_pb2_grpc import EndpointServiceStub
from finemesh.inference.v1 import inference_service_pb2 as inference
from finemesh.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from finemesh.models.v1 import model_pb2
from finemesh.models.v1 import model_service_pb2 as models
from finemesh.models.v1.model_service_pb2_grpc import ModelServiceStub
from tests.contract.inference.conftest import BASE, World, ended_job, import_parts, publish
from tests.contract.inference.test_chat import GREEDY, HELLO, metered
from tests.contract.inference.test_endpoints import create, reaches
from tests.harness.polling import eventually


async def model_of(world: World, job: str) -> model_pb2.Model:
    """The model that a job made, once it is registered."""
    stub = ModelServiceStub(world.channel)

    async def made() -> list[model_pb2.Model]:
        listed = (await stub.ListModels(models.ListModelsRequest())).models
        return [model for model in listed if model.tuning_job.endswith(f"/{job}")]

    return (await eventually(made, bool))[0]


async def stop_and_delete(world: World, name: str) -> None:
    stub = EndpointServiceStub(world.channel)
    await stub.StopEndpoint(endpoints.StopEndpointRequest(name=name))
    await reaches(world, name, "STOPPED")
    await stub.DeleteEndpoint(endpoints.DeleteEndpointRequest(name=name))


async def test_a_later_model_does_not_take_the_name_of_an_endpoint(world: World) -> None:
    with world.caller():
        made = await create(world, endpoint_name="bot")
        await reaches(world, made.name, "READY")
        # Twice, as the bus may do.
        for _ in range(2):
            await publish(world, await ended_job(world, "demo/bot", "ft-bot"))
        model = await model_of(world, "ft-bot")
        assert model.model_id == "demo/bot-2"
        stub = InferenceServiceStub(world.channel)
        by_endpoint = await stub.Chat(inference.ChatRequest(model="demo/bot", messages=HELLO, sampling=GREEDY))
        by_model = await stub.Chat(inference.ChatRequest(model="demo/bot-2", messages=HELLO, sampling=GREEDY))
        assert by_model.revision == model.revision != by_endpoint.revision
        records = await metered(world)
        # Minutes pay for the one, tokens for the other.
        assert by_endpoint.generation_id not in records
        assert records[by_model.generation_id].model_id == "demo/bot-2"
        await stop_and_delete(world, made.name)


async def test_an_endpoint_does_not_take_the_name_of_a_model(world: World, tuned_model: str, base_folder: Path) -> None:
    with world.caller():
        await ModelServiceStub(world.channel).ImportBaseModel(import_parts(base_folder, "demo/base"))
        for model_id in (tuned_model, "demo/base"):
            with pytest.raises(AlreadyExists) as refused:
                await create(world, endpoint_name=model_id.removeprefix("demo/"))
            assert refused.value.reason == "ALREADY_EXISTS"


async def test_a_base_model_does_not_take_the_name_of_a_projects_own(
    world: World, tuned_model: str, base_folder: Path
) -> None:
    with world.caller():
        made = await create(world, endpoint_name="mine")
        for model_id in (tuned_model, made.endpoint_id):
            with pytest.raises(AlreadyExists) as refused:
                await ModelServiceStub(world.channel).ImportBaseModel(import_parts(base_folder, model_id))
            assert refused.value.reason == "ALREADY_EXISTS"
        await stop_and_delete(world, made.name)


async def test_a_deleted_name_is_free_again(world: World, base_folder: Path) -> None:
    with world.caller():
        made = await create(world, endpoint_name="free")
        await stop_and_delete(world, made.name)
        await publish(world, await ended_job(world, "demo/free", "ft-free"))
        model = await model_of(world, "ft-free")
        assert model.model_id == "demo/free"
        await ModelServiceStub(world.channel).DeleteModel(models.DeleteModelRequest(name=model.name))
        made = await create(world, endpoint_name="free")
        await stop_and_delete(world, made.name)
        await ModelServiceStub(world.channel).ImportBaseModel(import_parts(base_folder, "demo/free"))


async def test_a_namespace_is_that_of_bases_or_of_a_project(world: World, base_folder: Path) -> None:
    names, stub = ModelArtifactServiceStub(world.channel), ModelServiceStub(world.channel)
    for _ in range(2):
        await names.ClaimProjectNamespace(artifacts.ClaimProjectNamespaceRequest(slug="llamas"))
    with world.caller():
        for model_id in ("llamas/small", "Llamas/small"):
            with pytest.raises(AlreadyExists) as refused:
                await stub.ImportBaseModel(import_parts(base_folder, model_id))
            assert refused.value.violations[0].field == "header.model_id"
        await stub.ImportBaseModel(import_parts(base_folder, "Alpacas/small"))
    with pytest.raises(AlreadyExists) as refused:
        await names.ClaimProjectNamespace(artifacts.ClaimProjectNamespaceRequest(slug="alpacas"))
    assert refused.value.violations[0].field == "slug"


async def test_the_scheduler_is_told_what_a_name_means(world: World, tuned_model: str) -> None:
    uses = artifacts.ModelNameUse
    with world.caller():
        endpoint = await create(world, endpoint_name="looked-up")
    assert world.settings.port_file is not None
    as_scheduler = world.settings.model_copy(update={"service_name": "scheduler"})
    channel = open_channel(as_scheduler, f"127.0.0.1:{world.settings.port_file.read_text().strip()}", "inference")
    try:
        stub = ModelArtifactServiceStub(channel)
        found = {
            name: uses.Name((await stub.LookUpModelName(artifacts.LookUpModelNameRequest(model_id=name))).use)
            for name in (BASE, tuned_model, endpoint.endpoint_id, "demo/never-made", "not a name", "")
        }
    finally:
        await channel.close()
    assert found == {
        BASE: "MODEL_NAME_USE_BASE_MODEL",
        tuned_model: "MODEL_NAME_USE_TUNED_MODEL",
        endpoint.endpoint_id: "MODEL_NAME_USE_ENDPOINT",
        "demo/never-made": "MODEL_NAME_USE_UNSPECIFIED",
        "not a name": "MODEL_NAME_USE_UNSPECIFIED",
        "": "MODEL_NAME_USE_UNSPECIFIED",
    }
    with world.caller():
        await stop_and_delete(world, endpoint.name)
