"""A model is asked in the tokens that it was trained with: trainer and server read one tokenizer and one template."""

import json
import shutil
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors

from formats.prompts.faults import RenderingRefused
from formats.prompts.round_trip import PAGE
from formats.row_errors import RowErrors
from formats.rows import Conversation, Instruction, Message, Text
from services.inference.engines.prompts.prompt_tokenizer import PromptTokenizer
from services.trainer.train.data.tokens.base_tokenizer import open_model_folder
from services.trainer.train.data.tokens.row_tokenizer import RowTokenizer
from services.trainer.train.data.tokens.template import ChatTemplate
from tests.harness.tokenizer_kinds import KINDS, write_kind

TODAY = date(2024, 7, 26)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(scope="module", params=["Llama 2", "Phi 3", "Gemma", "Llama 3", "Qwen", "DeepSeek distilled"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_kind(KINDS[request.param], tmp_path_factory.mktemp("model"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def rewritten(folder: Path, to: Path, change: Any) -> Path:
    shutil.copytree(folder, to, dirs_exist_ok=True)
    tokenizer = Tokenizer.from_file(str(to / "tokenizer.json"))
    change(tokenizer)
    tokenizer.save(str(to / "tokenizer.json"))
    return to


def test_conversations_are_asked_as_they_were_trained(folder: Path) -> None:
    opened = open_model_folder(folder)
    rows = RowTokenizer(opened, ChatTemplate.of(opened, TODAY), "auto")
    served = PromptTokenizer.read(folder)
    for text in PAGE.values():
        question, answer = Message(role="user", content=text), Message(role="assistant", content="x")
        ids, marks = rows.tokenize([Conversation(line=1, messages=(question, answer))], 512, RowErrors()).row(0)
        asked = served.chat_ids([{"role": "user", "content": text}])
        assert ids[: len(asked)].tolist() == asked
        assert not marks[: len(asked)].any()
        assert "".join(served.text_of(token) for token in ids[marks].tolist()).strip().startswith("x")


@pytest.mark.parametrize("closes", [False, True], ids=["as it is", "closes every text"])
def test_completions_are_asked_as_they_were_trained(folder: Path, tmp_path: Path, closes: bool) -> None:
    def close(tokenizer: Tokenizer) -> None:
        names = json.loads((folder / "tokenizer_config.json").read_text())
        first, last = names["bos_token"] or names["eos_token"], names["eos_token"]
        tokens = [(name, tokenizer.token_to_id(name)) for name in dict.fromkeys((first, last))]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A {last}", pair="$A $B", special_tokens=tokens
        )

    if closes:
        folder = rewritten(folder, tmp_path, close)
    opened = open_model_folder(folder)
    rows, served = RowTokenizer(opened, None, "auto"), PromptTokenizer.read(folder)
    for text in PAGE.values():
        ids, marks = rows.tokenize([Instruction(line=1, prompt=text, completion="c")], 512, RowErrors()).row(0)
        asked = served.text_ids(text, opening=True)
        assert ids[~marks].tolist() == asked
        assert asked[-1] != opened.eos_id
        assert served.text_ids(text, opening=False) == asked[len(opened.opening_ids) :]
        whole, _ = rows.tokenize([Text(line=1, text=text)], 512, RowErrors()).row(0)
        assert whole.tolist() == [*asked, opened.eos_id]


def test_a_prompt_that_ends_with_the_end_token_keeps_it(folder: Path) -> None:
    opened = open_model_folder(folder)
    text = f"a{opened.special_tokens['eos_token']}"
    ids, marks = (
        RowTokenizer(opened, None, "auto")
        .tokenize([Instruction(line=1, prompt=text, completion="c")], 512, RowErrors())
        .row(0)
    )
    assert ids[~marks].tolist() == PromptTokenizer.read(folder).text_ids(text, opening=True)
    assert ids[~marks][-1] == opened.eos_id


def test_a_token_without_weights_is_refused_on_both_sides(folder: Path, tmp_path: Path) -> None:
    folder = rewritten(folder, tmp_path, lambda tokenizer: tokenizer.add_special_tokens(["<image>"]))
    number = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id("<image>")
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {"vocab_size": number}))
    opened, served, errors = open_model_folder(folder), PromptTokenizer.read(folder), RowErrors()
    rows = [Instruction(line=1, prompt="a", completion="see <image>"), Instruction(line=2, prompt="a", completion="b")]
    kept = RowTokenizer(opened, None, "auto").tokenize(rows, 512, errors)
    assert kept.count == 1
    assert [(error.line, "'<image>'" in error.expectation) for error in errors.kept] == [(1, True)]
    with pytest.raises(RenderingRefused, match="'<image>' in it is a token that the model has no weights for"):
        served.text_ids("see <image>", opening=True)
    with pytest.raises(RenderingRefused, match="no weights"):
        served.chat_ids([{"role": "user", "content": "<image>"}])


def test_a_model_without_a_template_says_so(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(RenderingRefused, match="no chat template"):
        PromptTokenizer.read(tmp_path).chat_ids([{"role": "user", "content": "a"}])
