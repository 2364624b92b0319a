"""Whoever opens an exported model with transformers asks it in the tokens that it was trained with."""

import json
from pathlib import Path

import pytest

from formats.prompts.model_folder import read_model_folder
from formats.prompts.round_trip import PAGE
from services.trainer.train.export.exported_tokenizer import keep_tokens, keep_tokens_of_base
from tests.harness.tokenizer_kinds import KINDS, write_kind


@pytest.mark.parametrize("name", [name for name in KINDS if name != "DeepSeek distilled"])
def test_transformers_reads_an_export_as_it_was_trained(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    kind = KINDS[name]
    folder = write_kind(kind, tmp_path, model_max_length=512, chat_template="{{ messages }}")
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": kind.begin}))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    trained = read_model_folder(folder).tokenizer
    rewritten = keep_tokens(folder)
    # Of these, transformers 5 rebuilds the class by rules that are not those of the file.
    assert rewritten == (name in ("Llama 2", "CodeLlama"))
    if rewritten:
        assert not (folder / "special_tokens_map.json").exists()
    else:
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    theirs = AutoTokenizer.from_pretrained(str(folder))
    assert (theirs.model_max_length, theirs.chat_template) == (512, "{{ messages }}")
    assert (theirs.bos_token, theirs.eos_token) == (kind.begin, kind.end)
    for text in PAGE.values():
        said = f"{kind.begin or ''}{text}{kind.end} {text}"
        assert theirs.encode(said, add_special_tokens=False) == trained.encode(said, add_special_tokens=False).ids


def test_a_file_that_transformers_cannot_read_is_rewritten(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    flags = {"content": "<pad>", "lstrip": True}
    folder = write_kind(KINDS["Llama 3"], tmp_path, pad_token=flags)
    with pytest.raises(TypeError, match="pad_token"):
        AutoTokenizer.from_pretrained(str(folder))
    assert keep_tokens(folder)
    assert AutoTokenizer.from_pretrained(str(folder)).pad_token == "<pad>"


@pytest.mark.parametrize("name", ["Llama 2", "DeepSeek distilled", "Llama 3"])
def test_an_adapter_has_a_tokenizer_where_its_base_is_read_in_two_ways(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    kind = KINDS[name]
    (tmp_path / "base").mkdir()
    (tmp_path / "adapter").mkdir()
    base = write_kind(kind, tmp_path / "base", chat_template="{{ messages }}")
    assert keep_tokens_of_base(base, tmp_path / "adapter") == (name != "Llama 3")
    if name == "Llama 3":
        assert not any((tmp_path / "adapter").iterdir())
        return
    trained = read_model_folder(base).tokenizer
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "adapter"))
    assert theirs.chat_template == "{{ messages }}"
    for text in PAGE.values():
        said = f"{kind.begin}{text}{kind.end} {text}"
        assert theirs.encode(said, add_special_tokens=False) == trained.encode(said, add_special_tokens=False).ids
