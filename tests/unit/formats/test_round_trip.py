"""A page of text comes back from a tokenizer, or what is lost is the model's own choice, or it is refused."""

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from formats.prompts.faults import ModelFault
from formats.prompts.model_folder import read_model_folder
from formats.prompts.round_trip import PAGE, check_round_trip
from tests.harness.tokenizer_kinds import KINDS, ROWS, write_kind


def byte_level(change: Callable[[Tokenizer], None]) -> Tokenizer:
    tokenizer = KINDS["Llama 3"].made()
    change(tokenizer)
    return tokenizer


def by_characters(known: str, unknown: str | None) -> Tokenizer:
    """A token for each character that it knows."""
    vocabulary = {character: number for number, character in enumerate(dict.fromkeys([*known, unknown or "?"]))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=unknown))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


EVERYTHING = "".join(dict.fromkeys("".join(PAGE.values())))
ASCII = "".join(character for character in EVERYTHING if character.isascii())


def test_a_byte_level_file_under_the_name_of_llama_keeps_its_spaces(tmp_path: Path) -> None:
    folder = write_kind(KINDS["Llama 3"], tmp_path, tokenizer_class="LlamaTokenizerFast")
    text = "open the file — café 😀 def f(x):\n    return x"
    read = read_model_folder(folder).tokenizer
    ids = read.encode(text, add_special_tokens=False).ids
    assert ids == Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    assert read.decode(ids) == text


@pytest.mark.parametrize("lost", ["no_splitting", "no_decoder"])
def test_a_tokenizer_that_loses_spaces_is_refused(lost: str) -> None:
    def change(tokenizer: Tokenizer) -> None:
        if lost == "no_splitting":
            # As the classes of Llama rebuild it: bytes are then no tokens, and what is none is left out.
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )

    with pytest.raises(
        ModelFault, match=r"tokenizer.json does not give a text back \(a sentence\): 'The quick"
    ) as found:
        check_round_trip(byte_level(change))
    assert found.value.part == "tokenizer.json"


@pytest.mark.parametrize(
    ("normalizer", "changed"),
    [
        (normalizers.NFC(), {"combined accents"}),
        (normalizers.NFKC(), {"combined accents", "wide and special forms", "accents"}),
        (normalizers.Lowercase(), {"a sentence", "code", "accents", "combined accents", "other alphabets"}),
        (normalizers.Replace(" ", "_"), {"a sentence", "runs of spaces", "code", "emoji"}),
    ],
    ids=["NFC", "NFKC", "lower case", "replace"],
)
def test_what_the_files_normalizer_changes_is_named(normalizer: Any, changed: set[str]) -> None:
    losses = check_round_trip(byte_level(lambda tokenizer: setattr(tokenizer, "normalizer", normalizer)))
    assert {loss.what for loss in losses} >= changed
    assert all("the normalizer of tokenizer.json changes it" in loss.why for loss in losses)


def test_characters_without_a_token_are_named() -> None:
    assert check_round_trip(by_characters(EVERYTHING, None)) == ()
    losses = {loss.what: loss.why for loss in check_round_trip(by_characters(ASCII, "\ufffd"))}
    assert losses["other alphabets"].startswith("the vocabulary has no tokens for")
    assert "😀" in losses["emoji"]
    assert "code" not in losses


@pytest.mark.parametrize("missing", ["e", "7", "{", "\n", " "])
def test_a_vocabulary_without_a_letter_is_refused(missing: str) -> None:
    with pytest.raises(ModelFault, match="does not give a text back"):
        check_round_trip(by_characters(ASCII.replace(missing, ""), "\ufffd"))


def test_what_is_left_out_without_a_word_is_refused() -> None:
    with pytest.raises(ModelFault, match=r"\(accents\)"):
        check_round_trip(by_characters(ASCII, None))


def test_a_token_without_a_row_in_the_weights_is_refused() -> None:
    with pytest.raises(ModelFault, match=r"gives token \d+, and the model has 300 tokens"):
        check_round_trip(byte_level(lambda tokenizer: None), 300)
    assert check_round_trip(byte_level(lambda tokenizer: None), ROWS) == ()


@pytest.mark.parametrize("before", [[], ["<|begin_of_text|>"]])
@pytest.mark.parametrize("behind", [[], ["<|eot_id|>"]])
def test_a_prompt_opens_as_a_text_does_and_is_not_closed(tmp_path: Path, before: list[str], behind: list[str]) -> None:
    kind = KINDS["Llama 3"]
    folder = write_kind(kind, tmp_path)
    tokenizer = kind.made()
    numbers = {token: tokenizer.token_to_id(token) for token in (*before, *behind)}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join([*before, "$A", *behind]), pair="$A $B", special_tokens=list(numbers.items())
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    assert read_model_folder(folder).opening_ids == tuple(numbers[token] for token in before)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"tokenizer_class": "GPT2Tokenizer"}, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}),
        ({"tokenizer_class": "GPT2Tokenizer", "bos_token": None}, {"eos_token": "<|eot_id|>"}),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, {}),
    ],
)
def test_names_that_a_class_would_know_come_from_the_ids_of_the_config(
    tmp_path: Path, config: dict[str, Any], names: dict[str, str]
) -> None:
    folder = write_kind(KINDS["Llama 3"], tmp_path)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {"bos_token_id": 0, "eos_token_id": 1}))
    read = read_model_folder(folder)
    assert read.special_tokens == names
    assert read.eos_id == 1


def test_a_pattern_that_is_to_be_mended_must_be_mended_in_the_file(tmp_path: Path) -> None:
    folder = write_kind(KINDS["Mistral tekken"], tmp_path, fix_mistral_regex=True)
    with pytest.raises(ModelFault, match=r"tokenizer_config\.json sets fix_mistral_regex"):
        read_model_folder(folder)
    document = json.loads((folder / "tokenizer.json").read_text())
    document["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = _mended()
    (folder / "tokenizer.json").write_text(json.dumps(document))
    read_model_folder(folder)


def _mended() -> str:
    """As transformers writes it."""
    from transformers import PreTrainedTokenizerFast

    return re.findall(r'Regex\(\s*r"(.*)"', inspect.getsource(PreTrainedTokenizerFast._patch_mistral_regex))[0]
