"""What `finemesh models` sends when it imports: the files, and what the options say of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from finemesh.models.v1 import model_pb2, model_service_pb2
from finemesh.models.v1.model_service_pb2_grpc import ModelServiceServicer, add_ModelServiceServicer_to_server
from finemesh_client.cli.main import app
from tests.unit.client.conftest import Serve


class Imports(ModelServiceServicer):
    """Takes any import and remembers its messages."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def ImportBaseModel(self, request_iterator: Iterator[Any], context: Any) -> Any:
        self.sent = list(request_iterator)
        return model_service_pb2.ImportBaseModelResponse(base_model=model_pb2.BaseModel(model_id="acme/base"))

    def ImportAdapter(self, request_iterator: Iterator[Any], context: Any) -> Any:
        self.sent = list(request_iterator)
        model = model_pb2.Model(model_id="demo/bot", base_model="acme/base", adapter_rank=4, revision="rv_1")
        return model_service_pb2.ImportAdapterResponse(model=model)


@pytest.fixture
def imports(serve: Serve) -> Imports:
    made = Imports()
    serve(made, add_ModelServiceServicer_to_server)
    return made


def folder_of(path: Path, *names: str) -> Path:
    path.mkdir()
    for name in names:
        (path / name).write_text("{}")
    return path


def plain(output: str) -> str:
    """Without the box and the line breaks that errors are shown with."""
    return " ".join(output.replace("│", " ").split())


def test_an_adapter_is_sent_with_its_name_and_its_base(imports: Imports, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "lora", "adapter_config.json", "adapter_model.safetensors", "optimizer.pt")
    told = CliRunner().invoke(app, ["models", "import-adapter", str(folder), "--base", "acme/base", "--as", "bot"])
    assert told.exit_code == 0, told.output
    assert "demo/bot rv_1: rank 4 on acme/base" in told.output
    assert 'finemesh chat demo/bot "a question"' in told.output
    header, *files = imports.sent
    assert (header.header.output_name, header.header.base_model) == ("bot", "acme/base")
    assert [each.file.path for each in files if each.HasField("file")] == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    command = ["models", "import-adapter", str(folder), "--base", "acme/base", "--as", "bot", "--json"]
    assert json.loads(CliRunner().invoke(app, command).stdout)["model_id"] == "demo/bot"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--base", "acme/base"], "--as NAME"),
        (["--as", "bot"], "--base"),
        (["--base", "acme/base", "--as", "bot", "--revision", "main"], "belong to the hub"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_sent(
    imports: Imports, tmp_path: Path, options: list[str], said: str
) -> None:
    folder = folder_of(tmp_path / "lora", "adapter_config.json", "adapter_model.safetensors")
    told = CliRunner().invoke(app, ["models", "import-adapter", str(folder), *options])
    assert told.exit_code != 0
    assert said in plain(told.output)
    assert imports.sent == []


def test_a_template_travels_in_the_header(imports: Imports, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "base", "config.json", "tokenizer.json", "model.safetensors")
    template = tmp_path / "own.jinja"
    command = ["models", "import", str(folder), "--as", "acme/base", "--chat-template", str(template)]
    template.write_text("{{ 'é' }}", encoding="utf-8")
    assert CliRunner().invoke(app, command).exit_code == 0
    assert imports.sent[0].header.chat_template == "{{ 'é' }}"
    imports.sent = []
    for content, said in ((b"\xff", "no text in UTF-8"), (b" \n", "is empty")):
        template.write_bytes(content)
        told = CliRunner().invoke(app, command)
        assert told.exit_code != 0
        assert said in plain(told.output)
    assert imports.sent == []
