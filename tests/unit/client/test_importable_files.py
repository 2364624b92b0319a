"""What an import sends of a local folder: its own files, and nothing that a link in it names."""

from pathlib import Path

import pytest

from finemesh_client.errors import InvalidRequest
from finemesh_client.models import adapter_files, importable_files


def test_links_are_followed_inside_the_folder_only(tmp_path: Path):
    folder, secret = tmp_path / "model", tmp_path / "secret.json"
    folder.mkdir()
    secret.write_text("{}")
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).write_text("{}")
    (folder / "again.json").symlink_to("config.json")
    assert len(importable_files(folder)) == 4
    (folder / "vocab.json").symlink_to(secret)
    with pytest.raises(InvalidRequest, match=r"vocab\.json is a link out of the folder") as refused:
        importable_files(folder)
    assert refused.value.reason == "MODEL_INVALID"


def test_an_adapter_is_its_two_files(tmp_path: Path):
    folder, secret = tmp_path / "lora", tmp_path / "secret.json"
    folder.mkdir()
    secret.write_text("{}")
    (folder / "adapter_model.safetensors").write_text("w")
    (folder / "adapter_model.bin").write_text("code")
    with pytest.raises(InvalidRequest, match=r"has no adapter_config\.json \(other formats can carry code\)"):
        adapter_files(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(InvalidRequest, match="it holds a whole model: `finemesh models import`"):
        adapter_files(folder)
    (folder / "adapter_config.json").symlink_to(secret)
    with pytest.raises(InvalidRequest, match="is a link out of the folder"):
        adapter_files(folder)
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").write_text("{}")
    assert [path.name for path in adapter_files(folder)] == ["adapter_config.json", "adapter_model.safetensors"]
