"""What an import sends of a local folder: its own files, and nothing that a link in it names."""

from pathlib import Path

import pytest

from finemesh_client.errors import InvalidRequest
from finemesh_client.models import importable_files


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
