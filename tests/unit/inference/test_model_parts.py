"""A model of several parts is refused for what it is: at the import, at the quote and by an engine."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from chassis.errors import InvalidArgument
from formats.manifests import FileDigest
from services.inference.engines.base import EngineFailed
from services.inference.engines.model_files import read_config
from services.inference.models.model_facts import read_facts
from services.trainer.train.data.tokens.base_tokenizer import open_model_folder
from services.trainer.train.settings.failures import Failure
from tests.harness.tokenizer_kinds import KINDS, write_kind

WHY = r"describes a model of several parts \(text_config\); only language models alone are"


def test_every_door_says_the_same(tmp_path: Path) -> None:
    folder = write_kind(KINDS["Llama 3"], tmp_path)
    language = json.loads((folder / "config.json").read_text())
    about = {"architectures": ["SomeForConditionalGeneration"], "model_type": "some", "text_config": language}
    (folder / "config.json").write_text(json.dumps(about))
    save_file({"embedding": np.zeros((4, 4), np.float32)}, folder / "model.safetensors")
    files = [FileDigest(path=path.name, size_bytes=path.stat().st_size, sha256="0" * 64) for path in folder.iterdir()]
    with pytest.raises(InvalidArgument, match=WHY) as imported:
        read_facts(folder, files)
    assert imported.value.reason == "MODEL_INVALID"
    with pytest.raises(Failure, match=WHY) as quoted:
        open_model_folder(folder)
    assert quoted.value.reason == "MODEL_INVALID"
    with pytest.raises(EngineFailed, match=WHY):
        read_config(folder)
