"""What owners rely on who bring an adapter of their own: it is checked, listed, served, metered and deleted like one
that a job made, and it is its project's alone."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import numpy as np
import pytest
from safetensors.numpy import save_file

from chassis.errors import (
    AlreadyExists,
    Cancelled,
    DataLoss,
    DeadlineExceeded,
    DomainError,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)
from finemesh.inference.v1 import generation_pb2, inference_service_pb2, inference_service_pb2_grpc
from finemesh.models.v1 import model_pb2
from finemesh.models.v1 import model_service_pb2 as models
from finemesh.models.v1.model_service_pb2_grpc import ModelServiceStub
from tests.contract.inference.conftest import BASE, World, running_beside

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": r".*q_pro.", "alpha_pattern": {"q_pro.": 4}}


def write_adapter(folder: Path, config: Any = CONFIG, rank: int = 2, width: int = 8, fill: float = 0.5) -> Path:
    folder.mkdir(exist_ok=True)
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    matrices = {
        f"{layer}.lora_A.weight": np.full((rank, width), fill, np.float32),
        f"{layer}.lora_B.weight": np.full((width, rank), fill, np.float32),
    }
    save_file(matrices, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


async def parts(
    folder: Path, name: str, base: str = BASE, *, source: str = "", last_part: int | None = None, **broken: str
) -> AsyncIterator[models.ImportAdapterRequest]:
    """The messages of an import; after `last_part` the stream breaks."""
    header = models.ImportAdapterHeader(output_name=name, base_model=base, source=source)
    sent = [models.ImportAdapterRequest(header=header)]
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        digest = broken.get(path.stem, hashlib.sha256(content).hexdigest())
        file = models.ImportAdapterFile(path=path.name, size_bytes=len(content), sha256=digest)
        sent += [models.ImportAdapterRequest(file=file), models.ImportAdapterRequest(chunk=content)]
    for part in sent[:last_part]:
        yield part


async def imported(world: World, folder: Path, name: str, **more: Any) -> model_pb2.Model:
    return (await ModelServiceStub(world.channel).ImportAdapter(parts(folder, name, **more))).model


def stored(world: World) -> list[str]:
    root = Path(world.settings.artifacts_url.removeprefix("file://")) / "base/_adapters"
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


async def test_it_is_a_model_of_the_project_like_a_tuned_one(world: World, tmp_path: Path) -> None:
    stub, chats = ModelServiceStub(world.channel), inference_service_pb2_grpc.InferenceServiceStub(world.channel)
    source = "hf:acme/lora@0123456789abcdef0123456789abcdef01234567"
    # A key without any role: who may tune may bring an adapter.
    with world.caller(roles=frozenset()):
        model = await imported(world, write_adapter(tmp_path / "a"), "bot", source=source)
        assert (model.model_id, model.kind, model.adapter_rank) == ("demo/bot", model_pb2.MODEL_KIND_ADAPTER, 2)
        assert (model.base_model, model.tuning_job) == (BASE, "")
        assert (model.lineage["imported_from"], model.lineage["imported_by"]) == (source, "key_1")
        assert model in (await stub.ListModels(models.ListModelsRequest())).models
        assert (await stub.GetModel(models.GetModelRequest(name="demo/bot"))).model == model
        request = inference_service_pb2.ChatRequest(
            model="demo/bot", messages=[generation_pb2.ChatMessage(role="user", content="hello")]
        )
        answer = await chats.Chat(request)
        assert answer.usage.output_tokens > 0
        # What is stored is what is served, and needs no expression of a stranger to be read.
        config = {}
        for file in model.files:
            content = b""
            request_file = models.DownloadModelFileRequest(name=model.name, path=file.path)
            async for part in stub.DownloadModelFile(request_file):
                content += part.chunk
            assert hashlib.sha256(content).hexdigest() == file.sha256
            if file.path == "adapter_config.json":
                config = json.loads(content)
        assert config["target_modules"] == ["model.layers.0.self_attn.q_proj"]
        assert config["alpha_pattern"] == {r"^model\.layers\.0\.self_attn\.q_proj": 4}
    with world.caller(project="proj_b", namespace="other"), pytest.raises(NotFound):
        await stub.GetModel(models.GetModelRequest(name=model.name))


async def test_what_ends_its_answers_comes_with_it_and_nothing_else_of_that_file(world: World, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    ends = {"eos_token_id": [7, 3], "temperature": 0.1}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    stub = ModelServiceStub(world.channel)
    with world.caller():
        model = await imported(world, folder, "ending")
        request = models.DownloadModelFileRequest(name=model.name, path="generation_config.json")
        content = b"".join([part.chunk async for part in stub.DownloadModelFile(request)])
        assert json.loads(content) == {"eos_token_id": [3, 7]}
        assert await imported(world, folder, "ending") == model
        (folder / "generation_config.json").write_text('{"eos_token_id": "<end>"}')
        with pytest.raises(InvalidArgument, match="neither a token id nor a list") as refused:
            await imported(world, folder, "words")
        assert refused.value.reason == "MODEL_INVALID"


async def test_the_same_import_sent_again_gives_the_same_model(world: World, tmp_path: Path) -> None:
    """As when the answer was lost; other files under the name are refused."""
    folder = write_adapter(tmp_path / "a")
    with world.caller():
        first = await imported(world, folder, "twice")
        before = stored(world)
        assert await imported(world, folder, "twice") == first
        assert stored(world) == before
        with pytest.raises(AlreadyExists) as refused:
            await imported(world, write_adapter(tmp_path / "b", fill=0.25), "twice")
        assert "output_name" in refused.value.message
        # The same files under another name are another model.
        assert (await imported(world, folder, "thrice")).name != first.name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"config": CONFIG | {"init_lora_weights": "pissa"}}, "init_lora_weights is 'pissa' (PiSSA"),
        ({"config": CONFIG | {"alora_invocation_tokens": [5, 6]}}, "alora_invocation_tokens"),
        ({"config": CONFIG | {"use_dora": True}}, "merge_and_unload"),
        ({"config": CONFIG | {"target_modules": ["k_proj"]}}, "which its target_modules"),
        ({"config": [], "rank": 2}, "not a JSON object"),
        ({"config": CONFIG | {"target_modules": "((.)+)+X"}}, "take more than 5 s to match"),
        ({"rank": 4}, "has rank 4; its config says 2"),
        ({"width": 16}, "has shape [2, 16], the base model needs [2, 8]"),
        ({"fill": float("nan")}, "holds values that are infinite or not numbers"),
        ({"config": CONFIG | {"r": 1000}}, "the largest rank"),
    ],
    ids=["pissa", "alora", "dora", "modules", "no object", "endless", "rank", "shape", "nan", "too large"],
)  # fmt: skip
async def test_what_an_engine_could_not_serve_truly_is_refused(
    world: World, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    before = stored(world)
    with world.caller(), pytest.raises(InvalidArgument) as refused:
        await imported(world, write_adapter(tmp_path / "a", **change), "wrong")
    assert refused.value.reason == "MODEL_INVALID"
    assert said in refused.value.message
    assert stored(world) == before
    assert not list((world.settings.data_dir / "imports").iterdir())


async def test_an_import_that_is_cut_leaves_nothing_and_can_be_sent_again(world: World, tmp_path: Path) -> None:
    folder, before = write_adapter(tmp_path / "a"), stored(world)
    with world.caller():
        for last_part in (0, 1, 2, 3, 4):
            with pytest.raises((InvalidArgument, DataLoss, Cancelled)):
                await imported(world, folder, "cut", last_part=last_part)
        with pytest.raises(DataLoss, match="does not match its SHA-256"):
            await imported(world, folder, "cut", adapter_model="0" * 64)
        assert stored(world) == before
        assert (await imported(world, folder, "cut")).model_id == "demo/cut"


@pytest.mark.parametrize(
    ("name", "base", "source", "error", "field"),
    [
        ("A b", BASE, "", InvalidArgument, "header.output_name"),
        ("x/y", BASE, "", InvalidArgument, "header.output_name"),
        ("fine", BASE, "two\nlines", InvalidArgument, "header.source"),
        ("fine", "acme/nothing", "", NotFound, ""),
    ],
)
async def test_a_wrong_header_is_refused_before_files_travel(
    world: World, tmp_path: Path, name: str, base: str, source: str, error: type[DomainError], field: str
) -> None:
    with world.caller(), pytest.raises(error) as refused:
        await imported(world, write_adapter(tmp_path / "a"), name, base=base, source=source)
    assert [violation.field for violation in refused.value.violations] == ([field] if field else [])


async def test_only_the_two_files_are_taken(world: World, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    (folder / "adapter_model.bin").write_bytes(b"\x80")
    with world.caller(), pytest.raises(InvalidArgument) as refused:
        await imported(world, folder, "more")
    assert refused.value.violations[0].field == "file.path"


async def test_a_deleted_one_frees_its_name_and_its_files_go(world: World, tmp_path: Path) -> None:
    stub, folder = ModelServiceStub(world.channel), write_adapter(tmp_path / "a")
    with world.caller():
        model = await imported(world, folder, "gone")
        id = model.name.rpartition("/")[2]
        assert any(id in path for path in stored(world))
        await stub.DeleteModel(models.DeleteModelRequest(name=model.name))
        with pytest.raises(NotFound):
            await stub.GetModel(models.GetModelRequest(name="demo/gone"))
        again = await imported(world, folder, "gone")
    connection = await asyncpg.connect(world.settings.database_url)
    try:
        noted = await connection.fetch("SELECT artifact_key FROM base_uploads WHERE claim_time IS NULL")
        assert [row["artifact_key"] for row in noted] == [f"base/_adapters/proj_a/{id}/"]
        assert again.name != model.name
    finally:
        await connection.close()


async def test_a_project_has_a_bounded_number(world: World, tmp_path: Path) -> None:
    limit, folder = world.settings.imported_adapters_max, write_adapter(tmp_path / "a")
    connection = await asyncpg.connect(world.settings.database_url)
    with world.caller(project="proj_full", namespace="full"):
        await imported(world, folder, "one")
        await connection.execute(
            "INSERT INTO models (id, project_id, model_id, kind, base_model, base_revision, revision, artifact_key,"
            " files, adapter_rank, tuning_job, lineage, created_at)"
            " SELECT 'ml_n' || n, 'proj_full', 'full/n' || n, 'adapter', 'b', 'r', 'r', 'k', '[]', 1, 'import:n' || n,"
            " '{}', now() FROM generate_series(2, $1) AS n",
            limit,
        )
        with pytest.raises(ResourceExhausted) as refused:
            await imported(world, folder, "more")
        assert "imported_adapters_max" in refused.value.message
        await connection.execute("DELETE FROM models WHERE id = 'ml_n2'")
        await imported(world, folder, "more")
    await connection.close()


async def test_who_sends_nothing_loses_the_place(world: World, tmp_path: Path) -> None:
    """A place is one of few, so an organization has one, and only while something comes."""
    folder, opened, left = write_adapter(tmp_path / "a"), asyncio.Event(), asyncio.Event()

    async def silent() -> AsyncIterator[models.ImportAdapterRequest]:
        async for part in parts(folder, "slow", last_part=2):
            yield part
        opened.set()
        await left.wait()

    async with running_beside(world, tmp_path, adapter_import_idle_s_max=2.0) as beside:
        stub = ModelServiceStub(beside.channel)
        with beside.caller():
            waiting = asyncio.ensure_future(stub.ImportAdapter(silent()))
            await opened.wait()
            with pytest.raises(ResourceExhausted) as refused:
                await imported(beside, folder, "beside")
            assert refused.value.reason == "CAPACITY_EXHAUSTED"
            with pytest.raises(DeadlineExceeded, match="adapter_import_idle_s_max"):
                await waiting
            left.set()
            await imported(beside, folder, "after")
