"""Tokens that only the files beside tokenizer.json declare get the ids that transformers gives them, or are refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from formats.prompts.faults import ModelFault
from formats.prompts.model_folder import read_model_folder
from tests.harness.tokenizer_kinds import KINDS, write_kind

FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
CALL = {"content": "<|call|>", **FLAGS}
# The tokenizer of the folder has tokens 0 to 599, and the model has 1024.
FIRST = 600
TEXT = "a <|call|> b<pad>c <|tool|>  d <|eot_id|> e return"
CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_kind(KINDS["Llama 3"], tmp_path_factory.mktemp("model"))


def changed(plain: Path, folder: Path, files: dict[str, dict[str, Any]]) -> Path:
    shutil.copytree(plain, folder, dirs_exist_ok=True)
    for name, content in files.items():
        path = folder / name
        before = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(before | content))
    return folder


def theirs(folder: Path) -> Tokenizer:
    """As transformers' AutoTokenizer has it, which takes a tokenizer.json of this class as it is."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder)).backend_tokenizer


def parts(tokenizer: Tokenizer) -> tuple[list[int], dict[int, str]]:
    tokens = {number: repr(token) for number, token in tokenizer.get_added_tokens_decoder().items()}
    return tokenizer.encode(TEXT, add_special_tokens=False).ids, tokens


@pytest.mark.parametrize(
    "files",
    [
        {CONFIG: {"added_tokens_decoder": {"600": CALL}}},
        {CONFIG: {"added_tokens_decoder": {"600": CALL | {"special": False, "normalized": True, "lstrip": True}}}},
        {CONFIG: {"added_tokens_decoder": {"601": CALL, "600": CALL | {"content": "<pad>"}}}},
        {CONFIG: {"added_tokens_decoder": {"1": CALL | {"content": "<|eot_id|>", "lstrip": True, "rstrip": True}}}},
        {CONFIG: {"added_tokens_decoder": {"600": CALL}, "pad_token": "<pad>"}},
        {CONFIG: {"added_tokens_decoder": {"600": CALL}, "extra_special_tokens": ["<pad>", "<|call|>"]}},
        {CONFIG: {"pad_token": "<pad>"}},
        {CONFIG: {"pad_token": "<|eot_id|>"}},
        {CONFIG: {"pad_token": {"__type": "AddedToken", **CALL, "content": "<pad>", "rstrip": True}}},
        {CONFIG: {"call_token": "<|call|>", "pad_token": "<pad>"}},
        {CONFIG: {"additional_special_tokens": ["<|call|>", "<pad>"]}},
        {CONFIG: {"additional_special_tokens": [{"__type": "AddedToken", **CALL, "lstrip": True}]}},
        {CONFIG: {"extra_special_tokens": ["<|call|>"], "additional_special_tokens": ["<pad>"]}},
        {CONFIG: {"extra_special_tokens": {"call_token": "<|call|>"}}},
        {ADDED: {"<|call|>": 600}},
        {ADDED: {"<pad>": 601, "<|call|>": 600}},
        {ADDED: {"<|call|>": 600}, CONFIG: {"additional_special_tokens": ["<|call|>"]}},
        {ADDED: {"<|call|>": 600}, CONFIG: {"pad_token": "<|call|>"}},
        {MAP: {"pad_token": "<pad>"}},
        {MAP: {"pad_token": {"content": "<pad>", "lstrip": True, "rstrip": False, "normalized": False}}},
        {MAP: {"eos_token": "<|call|>"}},
        {MAP: {"additional_special_tokens": ["<|call|>"]}},
        {MAP: {"extra_special_tokens": ["<|call|>"]}, CONFIG: {"extra_special_tokens": ["<pad>"]}},
        {MAP: {"additional_special_tokens": ["<|call|>"]}, CONFIG: {"additional_special_tokens": ["<pad>"]}},
        {MAP: {"pad_token": "<pad>"}, CONFIG: {"added_tokens_decoder": {}}},
        {CONFIG: {"eos_token": "return"}},
    ],
    ids=str,
)
def test_declared_tokens_are_those_of_transformers(
    plain: Path, tmp_path: Path, files: dict[str, dict[str, Any]]
) -> None:
    folder = changed(plain, tmp_path, files)
    assert parts(read_model_folder(folder).tokenizer) == parts(theirs(folder))


NAMES = st.sampled_from(["<|call|>", "<pad>", "<|tool|>", "<|eot_id|>", "return"])
TOKENS = st.fixed_dictionaries(
    {"content": NAMES, **{flag: st.booleans() for flag in ("lstrip", "rstrip", "normalized", "special")}}
).map(lambda token: token | {"single_word": False})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    decoder=st.none() | st.lists(TOKENS, max_size=3, unique_by=lambda token: token["content"]),
    extra=st.lists(NAMES, max_size=3, unique=True),
    pad=st.none() | NAMES,
)
def test_any_declaration_is_read_as_by_transformers_or_refused(
    plain: Path,
    tmp_path_factory: pytest.TempPathFactory,
    decoder: list[dict[str, Any]] | None,
    extra: list[str],
    pad: str | None,
) -> None:
    config: dict[str, Any] = {"extra_special_tokens": extra, "pad_token": pad}
    if decoder is not None:
        config["added_tokens_decoder"] = {str(FIRST + index): token for index, token in enumerate(decoder)}
    folder = changed(plain, tmp_path_factory.mktemp("case"), {CONFIG: config})
    try:
        ours = parts(read_model_folder(folder).tokenizer)
    except ModelFault as fault:
        # Transformers gives such a token another id than the file says, without a word.
        assert "make the two files agree" in str(fault)
        declared = {token["content"]: FIRST + index for index, token in enumerate(decoder or [])}
        found = theirs(folder)
        assert any(found.token_to_id(text) != number for text, number in declared.items())
        return
    assert ours == parts(theirs(folder))


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        (
            {CONFIG: {"added_tokens_decoder": {"700": CALL}}},
            "tokenizer_config.json declares '<|call|>' as token 700, and by tokenizer.json it is token 600",
        ),
        (
            # An end token that was renamed in one file alone.
            {CONFIG: {"added_tokens_decoder": {"1": CALL | {"content": "<|im_end|>"}}, "eos_token": "<|im_end|>"}},
            "declares '<|im_end|>' as token 1, and by tokenizer.json it is token 600",
        ),
        ({ADDED: {"<|call|>": 5}}, "added_tokens.json declares '<|call|>' as token 5, and by tokenizer.json it is"),
        ({ADDED: {"<|call|>": "600"}}, "added_tokens.json gives '<|call|>' an id that is no integer"),
        ({CONFIG: {"split_special_tokens": True}}, "sets split_special_tokens"),
        ({CONFIG: {"added_tokens_decoder": ["<|call|>"]}}, "an added_tokens_decoder that is no object"),
        ({CONFIG: {"added_tokens_decoder": {"600": {"lstrip": True}}}}, "an added_tokens_decoder that is no object"),
        ({CONFIG: {"extra_special_tokens": "<|call|>"}}, "extra_special_tokens that are neither"),
        ({CONFIG: {"pad_token": {"content": "<pad>", "lstrip": "yes"}}}, "a special token with values of a wrong kind"),
        *(
            (files | {"config.json": {"vocab_size": 600}}, "would be token 600, and the model has 600 tokens")
            for files in (
                {CONFIG: {"added_tokens_decoder": {"600": CALL}}},
                {CONFIG: {"pad_token": "<pad>"}},
                {CONFIG: {"additional_special_tokens": ["<pad>"]}},
                {CONFIG: {"extra_special_tokens": {"call_token": "<|call|>"}}},
                {ADDED: {"<|call|>": 600}},
                {MAP: {"eos_token": "<|im_end|>"}},
            )
        ),
    ],
    ids=str,
)
def test_declarations_that_contradict_are_refused(
    plain: Path, tmp_path: Path, files: dict[str, dict[str, Any]], problem: str
) -> None:
    folder = changed(plain, tmp_path, files)
    with pytest.raises(ModelFault) as refused:
        read_model_folder(folder)
    assert problem in str(refused.value)


def test_a_token_of_tokenizer_json_without_a_row_is_taken(plain: Path, tmp_path: Path) -> None:
    """As Gemma 3 has one for images in its models of text: only a text that names it is refused."""
    tokenizer = Tokenizer.from_file(str(plain / "tokenizer.json"))
    tokenizer.add_special_tokens(["<image>"])
    folder = changed(plain, tmp_path, {"config.json": {"vocab_size": 600}})
    tokenizer.save(str(folder / "tokenizer.json"))
    read = read_model_folder(folder)
    assert read.tokenizer.token_to_id("<image>") == read.vocabulary_size == FIRST
