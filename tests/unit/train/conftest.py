"""A base model folder without weights: tokenizer, template and config are all that reading and counting need."""

import json
from pathlib import Path

import pytest

from formats.prompts.model_folder import ModelFolder
from services.trainer.train.data.tokens.base_tokenizer import open_model_folder
from services.trainer.train.recipes.corpus import standard_library_docstrings
from services.trainer.train.recipes.vocabulary import train_tokenizer, write_tokenizer


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    texts = [text for texts in standard_library_docstrings("asyncio/*.py") for text in texts]
    write_tokenizer(train_tokenizer(texts, 512), folder, 256)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 256}))
    return folder


@pytest.fixture(scope="session")
def model_folder(model_directory: Path) -> ModelFolder:
    return open_model_folder(model_directory)
