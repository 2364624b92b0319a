"""The tokenizers of the families: read as their tokenizer.json says, whatever class they name, and written so that
transformers reads them so too."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from formats.prompts.model_folder import ModelFolder, read_model_folder
from formats.prompts.round_trip import PAGE, check_round_trip
from formats.prompts.tokenizer_files import write_tokenizer_files
from tests.harness.tokenizer_kinds import KINDS, ROWS, Kind, write_kind


@pytest.fixture(scope="module", params=[*KINDS.values()], ids=[*KINDS])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def folder(kind: Kind, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_kind(kind, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def read(folder: Path) -> ModelFolder:
    return read_model_folder(folder)


def conversations(kind: Kind) -> list[str]:
    """The page in turns, with the markers that open and close them."""
    return [f"{kind.begin or ''}{text}{kind.end}\n {text}{kind.end}{text}" for text in PAGE.values()]


def ids_of(tokenizer: Any, text: str) -> list[int]:
    encoded = tokenizer.encode(text, add_special_tokens=False)
    return encoded if isinstance(encoded, list) else list(encoded.ids)


def test_the_ids_are_those_of_tokenizer_json(kind: Kind, folder: Path, read: ModelFolder) -> None:
    file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = [*PAGE.values(), *conversations(kind)]
    assert [ids_of(read.tokenizer, text) for text in texts] == [ids_of(file, text) for text in texts]
    assert read.opening_ids == tuple(file.encode("a").ids[: -len(ids_of(file, "a"))])


def test_a_page_of_text_comes_back(kind: Kind, read: ModelFolder) -> None:
    lost = {loss.what for loss in check_round_trip(read.tokenizer, ROWS)}
    # Qwen composes accents before it looks at them.
    assert lost == ({"combined accents"} if kind is KINDS["Qwen"] else set())


def test_transformers_reads_the_written_files_so(kind: Kind, read: ModelFolder, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_tokenizer_files(read.tokenizer, read.special_tokens, tmp_path)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    for text in (*PAGE.values(), *conversations(kind)):
        ids = ids_of(read.tokenizer, text)
        assert ids_of(theirs, text) == ids
        for skip in (False, True):
            assert theirs.decode(ids, skip_special_tokens=skip) == read.tokenizer.decode(ids, skip_special_tokens=skip)
    assert (theirs.bos_token, theirs.eos_token) == (kind.begin, kind.end)
    ours, written = (json.loads(tokenizer.to_str()) for tokenizer in (read.tokenizer, theirs.backend_tokenizer))
    # A tokenizer that adds nothing has no processor here and an empty one there.
    assert {**written, "post_processor": None} == {**ours, "post_processor": None}
    assert theirs("a").input_ids == [*read.opening_ids, *ids_of(theirs, "a")]
