"""A base model from the hub: which files are taken, that one commit is, and that nothing else is ever asked for.

The real huggingface_hub reads from a hub in this process,
in a process of its own because it looks at its settings once.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from finemesh_client.errors import InvalidRequest
from finemesh_client.hub_download import (
    SIDE_FILE_BYTES_MAX,
    WEIGHTS_BYTES_MAX,
    HubFile,
    chosen,
    chosen_of_adapter,
)
from tests.harness.hub import Hub, running_hub

TOKEN = "hf_reader-31c0"
ROOT = Path(__file__).parents[3]
MODEL = {
    "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
    "tokenizer.json": b"{}",
    "model.safetensors": bytes(range(256)) * 8,
}
OTHERS = {
    "modeling_evil.py": b"import os",
    "pytorch_model.bin": b"\x80\x04" * 50,
    "model.ckpt": b"x",
    "consolidated.safetensors": b"y" * 100,
    "onnx/model.safetensors": b"z" * 100,
    "README.md": b"# a model",
    "training_args.json": b"{}",
    ".gitattributes": b"",
}
FETCH = """
import json, sys
from finemesh_client.errors import FinemeshError
from finemesh_client.hub_download import fetch
try:
    found = fetch(sys.argv[1], sys.argv[2], sys.argv[3])
except FinemeshError as error:
    print(json.dumps({"reason": error.reason, "message": error.message}))
else:
    files = {path.name: path.read_bytes().hex() for path in found.files}
    print(json.dumps({"commit": found.commit, "files": files}))
"""


def names(*files: HubFile) -> list[str]:
    return [file.name for file in chosen("acme/base", files)]


def described(*extra: str, size_bytes: int = 10) -> list[HubFile]:
    return [HubFile(name=name, size_bytes=size_bytes) for name in ("config.json", "tokenizer.json", *extra)]


def test_of_an_adapters_repository_two_files_are_taken() -> None:
    two = [HubFile(name=name, size_bytes=9) for name in ("adapter_config.json", "adapter_model.safetensors")]
    others = [HubFile(name=name, size_bytes=9) for name in (*OTHERS, "adapter_model.bin", "tokenizer.json")]
    assert chosen_of_adapter("acme/lora", [*others, *two]) == two
    with pytest.raises(InvalidRequest, match=r"acme/lora has no adapter_model\.safetensors \(other formats"):
        chosen_of_adapter("acme/lora", [*others, two[0]])
    with pytest.raises(InvalidRequest, match="it holds a whole model"):
        chosen_of_adapter("acme/base", described("model.safetensors"))
    with pytest.raises(InvalidRequest, match="more bytes than an adapter"):
        chosen_of_adapter("acme/lora", [HubFile(name=two[0].name, size_bytes=SIDE_FILE_BYTES_MAX + 1), two[1]])


def test_only_what_a_model_needs_is_taken() -> None:
    files = [HubFile(name=name, size_bytes=len(content)) for name, content in {**MODEL, **OTHERS}.items()]
    assert sorted(names(*files)) == sorted(MODEL)


def test_shards_come_whole_and_with_their_index() -> None:
    index = "model.safetensors.index.json"
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    assert names(*described(index, *shards)) == ["config.json", "tokenizer.json", index, *shards]
    for lacking in (shards[:1], shards[1:], [shards[0], "model-00002-of-00003.safetensors"]):
        with pytest.raises(InvalidRequest, match="does not have all of its weights"):
            chosen("acme/base", described(index, *lacking))


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (described("pytorch_model.bin"), "no model.safetensors"),
        ([HubFile(name="model.safetensors", size_bytes=1)], "no config.json, no tokenizer.json"),
        (described("model.safetensors", size_bytes=SIDE_FILE_BYTES_MAX + 1), "config.json has more than"),
        (
            [*described(), HubFile(name="model.safetensors", size_bytes=WEIGHTS_BYTES_MAX + 1)],
            "bytes of weights",
        ),
    ],
)
def test_what_is_no_model_or_too_large_is_refused_before_anything_is_downloaded(
    files: list[HubFile], told: str
) -> None:
    with pytest.raises(InvalidRequest, match=told):
        chosen("acme/base", files)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub(TOKEN) as running:
        yield running


def fetched(hub: Hub, home: Path, revision: str, repository: str = "acme/base", **more: str) -> dict[str, object]:
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'gen'}:{ROOT / 'client'}",
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "0",
        **more,
    }
    command = [sys.executable, "-c", FETCH, repository, revision, TOKEN]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert TOKEN not in done.stdout + done.stderr
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def test_a_branch_is_resolved_once_and_a_commit_is_taken_as_it_was(hub: Hub, tmp_path: Path) -> None:
    first = hub.repository("acme/base", {**MODEL, **OTHERS})
    second = hub.repository("acme/base", {"tokenizer.json": b'{"newer": true}'})
    newest = fetched(hub, tmp_path, "")
    assert newest["commit"] == second
    hub.requests.clear()
    pinned = fetched(hub, tmp_path, first)
    assert pinned["commit"] == first
    assert pinned["files"] == {name: content.hex() for name, content in MODEL.items()}
    asked = [path for _, path in hub.requests if "/resolve/" in path]
    assert asked
    assert all(f"/resolve/{first}/" in path for path in asked)
    assert {path.rpartition(f"/{first}/")[2] for path in asked} <= set(MODEL)


def test_what_is_not_there_is_told_with_the_hubs_answer(hub: Hub, tmp_path: Path) -> None:
    assert fetched(hub, tmp_path, "main", "acme/none")["reason"] == "MODEL_UNKNOWN"
    hub.repository("acme/base", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    refused = fetched(hub, tmp_path, "main")
    assert refused["reason"] == "MODEL_INVALID"
    assert not any("/resolve/" in path for _, path in hub.requests)


def test_libraries_that_were_taken_offline_are_named_as_the_reason(hub: Hub, tmp_path: Path) -> None:
    hub.repository("acme/base", MODEL)
    refused = fetched(hub, tmp_path, "main", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in str(refused["message"])
    assert not hub.requests


def test_other_bytes_than_the_hub_announced_are_refused(hub: Hub, tmp_path: Path) -> None:
    commit = hub.repository("acme/base", MODEL)
    weights = hub.repositories["acme/base"].files

    def swap(path: str) -> None:
        if path.endswith("/model.safetensors"):
            weights["model.safetensors"] = bytes(len(MODEL["model.safetensors"]))

    hub.before = swap
    assert fetched(hub, tmp_path, commit)["reason"] == "DATA_CORRUPT"
