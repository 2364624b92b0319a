"""The token ids of the prompt that a server reads for each answer, against those that the answer was trained behind:
for all families, with tokenizers that join line breaks as the real ones do.

Where an earlier answer that is learned, too, had to be cut off from its prompt, that cut stays in the context of the
later one: there the text and the tokens of the last turn are the same.
"""

import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from formats.prompts.model_folder import ModelFolder
from formats.prompts.plain_messages import plain
from formats.row_errors import RowErrors
from formats.rows import Conversation
from services.trainer.train.data.tokens.base_tokenizer import open_model_folder
from services.trainer.train.data.tokens.row_tokenizer import RowTokenizer
from services.trainer.train.data.tokens.template import ChatTemplate
from tests.families.tokenizers_of import VOCABULARY, sentence_pieces
from tests.unit.train.family_rows import ENTRIES, TOKENS, VISION_ONLY, families, messages_of, row, said, shipped, user
from tests.unit.train.test_family_marks import TODAY, _Clock

# Line breaks with the spaces before them are one piece, as in Llama 3 and Qwen.
LINES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|end|>"]
TEXTS = ["<think>\n\n</think>\n\nOslo.<|im_end|>\n\n", "a\n\nb\n\n\nc  d", "assistant\n\nanswer user\n\nquestion"] * 20


def tokenizer(kind: str) -> Tokenizer:
    made = Tokenizer(models.BPE())
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt2")
    split = [] if kind == "gpt2" else [pre_tokenizers.Split(Regex(LINES), "isolated")]
    made.pre_tokenizer = pre_tokenizers.Sequence([*split, whole])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return made


@pytest.fixture(scope="module", params=["lines", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    path: Path = tmp_path_factory.mktemp("folder")
    tokenizer(request.param).save(str(path / "tokenizer.json"))
    written = {"tokenizer_class": "PreTrainedTokenizerFast", **TOKENS}
    (path / "tokenizer_config.json").write_text(json.dumps(written))
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 400}))
    return open_model_folder(path)


def test_prompts_are_served_in_the_tokens_that_were_trained(
    folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template_utils, "datetime", _Clock)
    assert datetime.now() != _Clock.now()
    served = PreTrainedTokenizerFast(tokenizer_object=folder.tokenizer, **TOKENS)
    same = alike = 0
    for family in families():
        if family in VISION_ONLY:
            continue
        rows = RowTokenizer(folder, ChatTemplate(shipped(family), TOKENS, TODAY), "auto")
        served.chat_template = shipped(family)
        for name in ENTRIES:
            asked = row(name)
            for ids, marks in tokens(rows, asked):
                begins = np.flatnonzero(marks & ~np.concatenate([[False], marks[:-1]]))
                learned = [i for i, each in enumerate(asked.messages) if each.role == "assistant" and each.weight]
                for index, begin in zip(learned, begins, strict=True):
                    if index:
                        prompt = served.apply_chat_template(
                            [plain(message) for message in asked.messages[:index]],
                            tools=list(asked.tools) or None,
                            add_generation_prompt=True,
                            return_dict=False,
                        )
                        trained = ids[:begin].tolist()
                        if trained == prompt:
                            same += 1
                            continue
                        assert index > learned[0], (family, name, index)
                        assert trained[-6:] == prompt[-6:], (family, name, index)
                        assert folder.tokenizer.decode(trained, skip_special_tokens=False) == folder.tokenizer.decode(
                            prompt, skip_special_tokens=False
                        )
                        alike += 1
    assert same > 250
    assert alike < same / 5


def test_an_answer_that_begins_with_line_breaks_has_tokens_of_its_own(folder: ModelFolder) -> None:
    source = "{% for m in messages %}{{ m.role + '\n' + m.content + '</s>\n' }}{% endfor %}" + (
        "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
    )
    rows = RowTokenizer(folder, ChatTemplate(source, TOKENS, TODAY), "auto")
    asked = Conversation(line=1, messages=messages_of([user("question"), said("\nanswer")]))
    ((ids, marks),) = tokens(rows, asked)
    assert folder.tokenizer.decode(ids[marks].tolist(), skip_special_tokens=False) == "\nanswer</s>\n"
    assert ids[~marks].tolist() == folder.tokenizer.encode("user\nquestion</s>\nassistant\n").ids


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """As of Llama 2: a space before every text, line breaks as bytes."""
    path: Path = tmp_path_factory.mktemp("pieces")
    (path / "tokenizer.json").write_text(json.dumps(sentence_pieces(("<unk>", "<s>", "</s>"), begin="<s>")))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **TOKENS}))
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": VOCABULARY}))
    return open_model_folder(path)


@pytest.mark.parametrize("header", ["ASSISTANT: ", "ASSISTANT:", "assistant\n", "[/INST] "])
@pytest.mark.parametrize("answer", ["the file", "The file", " the file", "\nfile", "é"])
def test_an_answer_behind_a_space_is_asked_for_as_it_was_trained(pieces: ModelFolder, header: str, answer: str) -> None:
    source = (
        "{% for m in messages %}{{ ('USER: ' if m.role == 'user' else header) + m.content + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ header }}{% endif %}"
    ).replace("header", repr(header))
    rows = RowTokenizer(pieces, ChatTemplate(source, TOKENS, TODAY), "auto")
    asked = Conversation(line=1, messages=messages_of([user("read"), said(answer), user("write"), said(answer)]))
    ((ids, marks),) = tokens(rows, asked)
    first = int(np.flatnonzero(marks)[0])
    prompt = pieces.tokenizer.encode(f"USER: read</s>{header}", add_special_tokens=False).ids
    assert ids[:first].tolist() == prompt
    said_text = pieces.tokenizer.decode([*prompt, *ids[first:][marks[first:]].tolist()], skip_special_tokens=False)
    assert said_text.endswith(f"{header}{answer}</s>{answer}</s>")


def tokens(rows: RowTokenizer, asked: Conversation) -> list[tuple[np.ndarray, np.ndarray]]:
    """None of a row that is refused."""
    made = rows.tokenize([replace(asked, weight=1.0)], 4096, RowErrors())
    return [made.row(index) for index in range(made.count)]
