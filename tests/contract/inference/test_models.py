"""What callers of ModelService rely on: imports are whole or nothing, registries are walls, downloads are exact."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import numpy as np
import pytest
from safetensors.numpy import save

from chassis.errors import DataLoss, InvalidArgument, NotFound, PermissionDenied
from finemesh.events.v1 import model_events_pb2
from finemesh.models.v1 import model_service_pb2 as models
from finemesh.models.v1.model_service_pb2_grpc import ModelServiceStub
from tests.contract.inference.conftest import BASE, World, ended_job, handled, import_parts, publish

NO_NUMBERS = np.full((16, 8), np.nan, dtype=np.float16)
LOSSY = json.dumps(
    {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"?": 0}, "unk_token": "?"}}
).encode()


async def base_ids(world: World) -> list[str]:
    with world.caller():
        answer = await ModelServiceStub(world.channel).ListBaseModels(models.ListBaseModelsRequest())
    return [model.model_id for model in answer.base_models]


async def test_importing_the_same_files_again_gives_the_same_revision(world: World, base_folder: Path) -> None:
    stub = ModelServiceStub(world.channel)
    with world.caller():
        before = (await stub.GetBaseModel(models.GetBaseModelRequest(name=f"baseModels/{BASE}"))).base_model
        again = (await stub.ImportBaseModel(import_parts(base_folder))).base_model
    assert again.revision == before.revision
    assert again.parameter_count == 16 * 8
    assert again.context_tokens_max == 512


async def test_a_base_model_says_where_it_comes_from(world: World, base_folder: Path) -> None:
    stub = ModelServiceStub(world.channel)
    source = "hf:acme/base@0123456789abcdef0123456789abcdef01234567"
    with world.caller():
        made = (await stub.ImportBaseModel(import_parts(base_folder, "acme/base", source=source))).base_model
        assert made.source == source
        # The same files by another way, of which nothing is said, leave it as it is.
        await stub.ImportBaseModel(import_parts(base_folder, "acme/base"))
        name = models.GetBaseModelRequest(name="baseModels/acme/base")
        assert (await stub.GetBaseModel(name)).base_model.source == source
        with pytest.raises(InvalidArgument) as refused:
            await stub.ImportBaseModel(import_parts(base_folder, "acme/base", source="two\nlines"))
    assert refused.value.violations[0].field == "header.source"


async def test_a_base_model_says_what_reads_its_answers(world: World, base_folder: Path) -> None:
    """As its files tell, or its importer; importing the same files again changes it."""
    stub = ModelServiceStub(world.channel)
    name = models.GetBaseModelRequest(name="baseModels/acme/caller")
    with world.caller():
        for told, shown in (("", "none"), ("hermes", "hermes"), ("none", "none")):
            parts = import_parts(base_folder, "acme/caller", tool_parser=told, reasoning_parser="qwen3")
            await stub.ImportBaseModel(parts)
            found = (await stub.GetBaseModel(name)).base_model
            assert (found.tool_parser, found.reasoning_parser) == (shown, "qwen3")
        with pytest.raises(InvalidArgument) as refused:
            await stub.ImportBaseModel(import_parts(base_folder, "acme/caller", tool_parser="herms"))
    assert refused.value.violations[0].field == "header.tool_parser"


async def test_a_template_that_is_given_stands_in_place_of_the_models_own(
    world: World, base_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(base_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text("its own")
    (tmp_path / "chat_template.json").write_text('{"chat_template": "its own"}')
    stub, given = ModelServiceStub(world.channel), "{% for m in messages %}{{ m['content'] }}é{% endfor %}"
    with world.caller():
        own = (await stub.ImportBaseModel(import_parts(tmp_path, "acme/own"))).base_model
        made = (await stub.ImportBaseModel(import_parts(tmp_path, "acme/given", chat_template=given))).base_model
        assert (own.chat_template_given, made.chat_template_given) == (False, True)
        assert own.revision != made.revision
        again = (await stub.ImportBaseModel(import_parts(tmp_path, "acme/given", chat_template=given))).base_model
        assert (again.revision, again.chat_template_given) == (made.revision, True)
        found = await stub.GetBaseModel(models.GetBaseModelRequest(name="baseModels/acme/given"))
        assert (found.base_model.revision, found.base_model.chat_template_given) == (made.revision, True)
        with pytest.raises(InvalidArgument) as refused:
            await stub.ImportBaseModel(import_parts(tmp_path, "acme/large", chat_template="x" * ((1 << 20) + 1)))
        assert refused.value.violations[0].field == "header.chat_template"
    root = Path(world.settings.artifacts_url.removeprefix("file://")) / "base/acme"
    kept = {path.name: path.read_text() for path in (root / "given" / made.revision).glob("chat_template*")}
    assert kept == {"chat_template.jinja": given}
    assert (root / "own" / own.revision / "chat_template.jinja").read_text() == "its own"


async def test_an_import_needs_the_operator_role(world: World, base_folder: Path) -> None:
    with world.caller(roles=frozenset({"member", "admin"})), pytest.raises(PermissionDenied) as refused:
        await ModelServiceStub(world.channel).ImportBaseModel(import_parts(base_folder))
    assert refused.value.reason == "ROLE_MISSING"


async def test_a_wrong_digest_leaves_nothing(world: World, base_folder: Path) -> None:
    with world.caller(), pytest.raises(DataLoss) as refused:
        await ModelServiceStub(world.channel).ImportBaseModel(
            import_parts(base_folder, "finemesh/torn", model="0" * 64)
        )
    assert refused.value.reason == "DIGEST_MISMATCH"
    assert "model.safetensors" in refused.value.message
    assert "finemesh/torn" not in await base_ids(world)
    assert not list((world.settings.data_dir / "imports").iterdir())


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("pytorch_model.bin", b"\x80\x04", "pytorch_model.bin is not one of"),
        ("config.json", json.dumps({"architectures": ["A"], "auto_map": {"AutoModel": "x.y"}}).encode(), "auto_map"),
        ("config.json", b"{", "is not JSON"),
        ("generation_config.json", b'{"eos_token_id": "</s>"}', "holds an eos_token_id that is neither"),
        ("model.safetensors", b"\xff" * 64, "is no safetensors file"),
        (
            "model.safetensors",
            save({"model.embed_tokens.weight": NO_NUMBERS}),
            "model.embed_tokens.weight holds values",
        ),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "model-2.safetensors"}}', "names files that are not"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "model.safetensors"}}', "names tensors that"),
        ("tokenizer.json", b"{}", "tokenizer.json: is no tokenizer"),
        ("tokenizer.json", LOSSY, "tokenizer.json: does not give a text back"),
    ],
)
async def test_files_that_could_carry_code_or_are_broken_are_refused(
    world: World, base_folder: Path, tmp_path: Path, name: str, content: bytes, expected: str
) -> None:
    for path in base_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_bytes(content)
    with world.caller(), pytest.raises(InvalidArgument) as refused:
        await ModelServiceStub(world.channel).ImportBaseModel(import_parts(tmp_path, "finemesh/broken"))
    assert refused.value.reason == "MODEL_INVALID"
    assert expected in refused.value.message
    assert "finemesh/broken" not in await base_ids(world)


@pytest.mark.parametrize("path", ["../evil.json", "a/b.json", "/etc/passwd.json", ".hidden.json", ""])
async def test_paths_cannot_leave_the_models_folder(world: World, path: str) -> None:
    async def parts() -> AsyncIterator[models.ImportBaseModelRequest]:
        yield models.ImportBaseModelRequest(header=models.ImportBaseModelHeader(model_id="finemesh/escape"))
        yield models.ImportBaseModelRequest(file=models.ImportBaseModelFile(path=path, size_bytes=1, sha256="0"))

    with world.caller(), pytest.raises(InvalidArgument) as refused:
        await ModelServiceStub(world.channel).ImportBaseModel(parts())
    assert refused.value.violations[0].field == "file.path"


async def test_unknown_models_are_not_found_by_name(world: World) -> None:
    with world.caller(), pytest.raises(NotFound) as refused:
        await ModelServiceStub(world.channel).GetModel(models.GetModelRequest(name="demo/nothing"))
    assert refused.value.reason == "MODEL_UNKNOWN"


async def test_a_tuned_model_is_registered_once_downloaded_exactly_and_walled_off(
    world: World, tuned_model: str
) -> None:
    stub = ModelServiceStub(world.channel)
    with world.caller():
        model = (await stub.GetModel(models.GetModelRequest(name=tuned_model))).model
        listed = (await stub.ListModels(models.ListModelsRequest())).models
        assert [m.model_id for m in listed] == [tuned_model]
        for file in model.files:
            content = b""
            async for part in stub.DownloadModelFile(
                models.DownloadModelFileRequest(name=model.name, path=file.path, offset_bytes=3)
            ):
                content += part.chunk
            assert len(content) == file.size_bytes - 3
            whole = world.settings.artifacts_url.removeprefix("file://") + f"/models/proj_a/tuned/{file.path}"
            assert hashlib.sha256(Path(whole).read_bytes()).hexdigest() == file.sha256
            assert Path(whole).read_bytes()[3:] == content
    with world.caller(project="proj_b"):
        for name in (model.name, tuned_model):
            with pytest.raises(NotFound):
                await stub.GetModel(models.GetModelRequest(name=name))
        assert not (await stub.ListModels(models.ListModelsRequest())).models


async def test_a_deletion_is_told_once_and_nobody_downloads_the_model_any_more(world: World) -> None:
    event = await ended_job(world, "demo/given-up", "ft-given-up")
    await handled(world, await publish(world, event))
    stub = ModelServiceStub(world.channel)
    with world.caller():
        model = (await stub.GetModel(models.GetModelRequest(name="demo/given-up"))).model
        await stub.DeleteModel(models.DeleteModelRequest(name=model.name))
        with pytest.raises(NotFound):
            await stub.DeleteModel(models.DeleteModelRequest(name=model.name))
        for name in (model.name, model.model_id):
            download = models.DownloadModelFileRequest(name=name, path=model.files[0].path)
            with pytest.raises(NotFound) as refused:
                await anext(aiter(stub.DownloadModelFile(download)))
            assert refused.value.reason == "MODEL_UNKNOWN"
    # The bus may tell of the job again: that brings nothing back.
    await handled(world, await publish(world, event))
    connection = await asyncpg.connect(world.settings.database_url)
    rows = await connection.fetch("SELECT payload FROM outbox WHERE subject = 'model.deleted'")
    await connection.close()
    (told,) = [model_events_pb2.ModelDeleted.FromString(row["payload"]) for row in rows]
    assert (told.model, told.model_id, told.tuning_job) == (model.name, model.model_id, event.tuning_job)
