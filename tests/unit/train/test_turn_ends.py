"""What ends a trained answer is read off the token rows, under templates of every form."""

from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

from formats.prompts.model_folder import ModelFolder
from formats.row_errors import RowErrors
from formats.rows import Conversation, Instruction, Message, Row, Tokens
from services.trainer.train.data.tokens.base_tokenizer import open_model_folder
from services.trainer.train.data.tokens.row_tokenizer import RowTokenizer
from services.trainer.train.data.tokens.template import ChatTemplate
from services.trainer.train.data.tokens.turn_ends import SHARE_MIN, TurnEnds, turn_ends

LENGTH_MAX = 256
HEAD = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content"
FOOT = "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"


@pytest.fixture(scope="module")
def folder(model_directory: Path) -> ModelFolder:
    """With `<|turn|>`, a special token, and `<stop>`, an added one that is none."""
    opened = open_model_folder(model_directory)
    tokenizer = Tokenizer.from_str(opened.tokenizer.to_str())
    tokenizer.add_special_tokens(["<|turn|>"])
    tokenizer.add_tokens([AddedToken("<stop>", special=False)])
    return replace(opened, tokenizer=tokenizer, vocabulary_size=tokenizer.get_vocab_size())


def conversation(*answers: str) -> Conversation:
    turns = [[Message(role="user", content="read?"), Message(role="assistant", content=each)] for each in answers]
    return Conversation(line=1, messages=tuple(message for turn in turns for message in turn))


def ends(folder: ModelFolder, rows: list[Row], template: str | None = None, *, inputs: bool = False) -> list[str]:
    found = found_in(folder, rows, template, inputs=inputs)
    return [str(folder.tokenizer.id_to_token(token_id)) for token_id in found.ids]


def found_in(
    folder: ModelFolder, rows: list[Row], template: str | None = None, *, inputs: bool = False, length: int = LENGTH_MAX
) -> TurnEnds:
    told = replace(folder, template_source=template)
    rendered = None if template is None else ChatTemplate.of(told, date(2024, 7, 26))
    kept = RowTokenizer(folder, rendered, True if inputs else "auto").tokenize(rows, length, RowErrors())
    return turn_ends(kept, folder.tokenizer, length)


@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize(
    ("behind", "expected"),
    [
        (" + '<|turn|>' }}", ["<|turn|>"]),
        (" + '<|turn|>\\n' }}", ["<|turn|>"]),
        (" + eos_token + '\\n\\n' }}", ["<|end|>"]),
        # Both are said by the trained model, and the last one ends the answer.
        (" + '<|turn|>\\n' + eos_token }}", ["<|end|>"]),
        (" + '<stop>\\n' }}", ["<stop>"]),
        (" + '\\n###\\n' }}", []),
        (" }}", []),
    ],
)
def test_the_last_special_token_behind_an_answer_ends_it(
    behind: str, expected: list[str], inputs: bool, folder: ModelFolder
) -> None:
    rows: list[Row] = [conversation("open the file", "close it"), conversation("key")]
    assert ends(folder, rows, HEAD + behind + FOOT, inputs=inputs) == expected
    assert found_in(folder, rows, HEAD + behind + FOOT, inputs=inputs).open_share == (0.0 if expected else 1.0)


def test_the_last_answer_counts_and_not_what_ends_earlier_ones(folder: ModelFolder) -> None:
    """In gpt-oss a token that ends earlier answers ends only the reasoning of the last one."""
    turn, end = (folder.tokenizer.token_to_id(name) for name in ("<|turn|>", "<|end|>"))
    ids, said = np.array([9, 5, turn, 9, 6, end], np.int32), np.array([False, True, True, False, True, True])
    assert ends(folder, [Tokens(line=1, ids=ids, labelled=said)]) == ["<|end|>"]


def test_a_row_that_ends_with_a_question_says_it_by_its_last_answer(folder: ModelFolder) -> None:
    asked = Conversation(line=1, messages=(*conversation("one").messages, Message(role="user", content="and?")))
    assert ends(folder, [asked], HEAD + " + '<|turn|>' }}" + FOOT) == ["<|turn|>"]


def test_prompts_and_completions_end_with_eos(folder: ModelFolder) -> None:
    assert ends(folder, [Instruction(line=1, prompt="a", completion="b")]) == ["<|end|>"]


def test_cut_rows_say_nothing(folder: ModelFolder) -> None:
    """One of them may be cut just behind a token that ends no answer."""
    template = HEAD + " + '<|turn|>' }}" + FOOT
    whole, long = conversation("one"), conversation("one " * 40)
    cut = found_in(folder, [whole, long], template, length=20)
    assert [folder.tokenizer.id_to_token(each) for each in cut.ids] == ["<|turn|>"]
    assert cut.open_share == 0.0
    assert found_in(folder, [long], template, length=20) == TurnEnds(ids=(), open_share=0.0)


def test_a_stray_token_at_the_end_of_few_rows_is_no_end(folder: ModelFolder) -> None:
    """Token rows come as their author cut them."""
    turn, user = (folder.tokenizer.encode(name, add_special_tokens=False).ids[0] for name in ("<|turn|>", "<|user|>"))

    def row(last: int) -> Row:
        return Tokens(line=1, ids=np.array([5, 6, 7, last], np.int32), labelled=None)

    rows = [row(turn) for _ in range(200)]
    few = int(200 * SHARE_MIN)
    assert ends(folder, [*rows, *(row(user) for _ in range(few - 1))]) == ["<|turn|>"]
    assert ends(folder, [*rows, *(row(user) for _ in range(2 * few))]) == ["<|turn|>", "<|user|>"]
