"""Which tokens carry loss, against expectations written by hand."""

from datetime import date

import pytest

from formats.prompts.model_folder import ModelFolder
from formats.row_errors import RowErrors
from formats.rows import Conversation, Instruction, Message
from services.trainer.train.data.tokens.row_tokenizer import RowTokenizer
from services.trainer.train.data.tokens.template import ChatTemplate, check_template
from services.trainer.train.data.tokens.template_refusals import TemplateRefusal
from services.trainer.train.data.tokens.token_rows import TokenRows
from services.trainer.train.settings.failures import Failure

TODAY = date(2024, 7, 26)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = Conversation(
    line=1,
    messages=(
        Message(role="system", content="be kind"),
        Message(role="user", content="one?"),
        Message(role="assistant", content="1"),
        Message(role="user", content="two?"),
        Message(role="assistant", content="2"),
    ),
)


def trained_texts(source: str, row: Conversation, *, train_on_inputs: bool = False) -> list[str]:
    text, spans = ChatTemplate(source, {}, TODAY).trained_spans(row, train_on_inputs=train_on_inputs)
    return [text[start:end] for start, end in spans]


def weighted(row: Conversation, *weights: int) -> Conversation:
    messages = zip(row.messages, weights, strict=True)
    return Conversation(
        line=1, messages=tuple(Message(role=m.role, content=m.content, weight=weight) for m, weight in messages)
    )


def test_only_answers_are_trained_each_with_its_end_marker() -> None:
    assert trained_texts(CHATML, TALK) == ["1<|im_end|>\n", "2<|im_end|>\n"]


def test_weight_zero_masks_an_answer() -> None:
    assert trained_texts(CHATML, weighted(TALK, 1, 1, 0, 1, 1)) == ["2<|im_end|>\n"]


def test_training_on_inputs_takes_everything_but_weight_zero() -> None:
    assert len(trained_texts(CHATML, TALK, train_on_inputs=True)) == 1
    pieces = trained_texts(CHATML, weighted(TALK, 1, 0, 1, 1, 1), train_on_inputs=True)
    assert pieces[0] == "<|im_start|>system\nbe kind<|im_end|>\n"
    assert pieces[1] == "<|im_start|>assistant\n1<|im_end|>\n"
    assert "one?" not in "".join(pieces)


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    source = "{{ messages | length }}" + CHATML
    with pytest.raises(TemplateRefusal, match=r"asks with '2<.*give earlier answers weight 0") as caught:
        trained_texts(source, TALK)
    assert caught.value.part == 2


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{% for m in messages %}{{ m.role + ':' + m.content + '.' }}{% endfor %}", "no generation prompt"),
        (
            "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}.{% endif %}{% endfor %}",
            "nothing between a question and its answer",
        ),
        (CHATML.replace("<|im_end|>", ""), "nothing behind an answer"),
        (
            CHATML.replace("assistant\n", "assistant\n<think>\n").replace(".content", ".content.split('</think>')[-1]"),
            "asks with '<think>",
        ),
        ("{{ messages[7].content }}", "chat template accepts"),
    ],
    ids=["header", "question", "end", "thought", "refuses"],
)
def test_a_template_under_which_no_answer_can_be_learned_is_refused(source: str, why: str) -> None:
    with pytest.raises(Failure, match=why) as caught:
        check_template(ChatTemplate(source, {}, TODAY))
    assert caught.value.reason == "MODEL_INVALID"


def test_a_template_that_refuses_answers_is_left_to_the_rows() -> None:
    source = "{% if messages | length > 1 %}{{ raise_exception('no') }}{% endif %}" + CHATML
    check_template(ChatTemplate(source, {}, TODAY))


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{% set _ = messages.append(1) %}",
        "{{ raise_exception('no') }}",
        "{% for i in range(10**9) %}{% endfor %}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    with pytest.raises(TemplateRefusal):
        ChatTemplate(source, {}, TODAY).render(TALK.messages, add_generation_prompt=False)


def test_generation_blocks_and_the_date_are_understood() -> None:
    source = "{{ strftime_now('%d %b %Y') }}{% generation %}{{ messages[0].content }}{% endgeneration %}"
    assert ChatTemplate(source, {}, TODAY).render(TALK.messages, add_generation_prompt=False) == "26 Jul 2024be kind"


def tokenize(
    folder: ModelFolder, row: Conversation | Instruction, length: int = 256, inputs: bool = False
) -> TokenRows:
    tokenizer = RowTokenizer(folder, ChatTemplate.of(folder, TODAY), inputs)
    return tokenizer.tokenize([row], length, RowErrors())


def pieces(folder: ModelFolder, rows: TokenRows) -> list[tuple[str | None, bool]]:
    ids, labelled = rows.row(0)
    return [(folder.tokenizer.id_to_token(i), bool(on)) for i, on in zip(ids.tolist(), labelled, strict=True)]


def test_token_marks_of_a_conversation(model_folder: ModelFolder) -> None:
    row = Conversation(
        line=1, messages=(Message(role="user", content="a\n"), Message(role="assistant", content="\n b"))
    )
    assert pieces(model_folder, tokenize(model_folder, row)) == [
        ("<|begin|>", False),
        ("<|user|>", False),
        ("a", False),
        ("Ċ", False),
        ("<|end|>", False),
        ("<|assistant|>", False),
        ("Ċ", True),
        ("Ġb", True),
        ("<|end|>", True),
    ]


def test_token_marks_of_an_instruction(model_folder: ModelFolder) -> None:
    row = Instruction(line=1, prompt="a", completion="b")
    assert pieces(model_folder, tokenize(model_folder, row)) == [
        ("<|begin|>", False),
        ("a", False),
        ("b", True),
        ("<|end|>", True),
    ]
    with_inputs = pieces(model_folder, tokenize(model_folder, row, inputs=True))
    assert [on for _, on in with_inputs] == [False, True, True, True]


def test_truncation_keeps_the_beginning_and_skips_rows_without_an_answer(model_folder: ModelFolder) -> None:
    row = Instruction(line=1, prompt="a b c d e", completion="x y z")
    whole = tokenize(model_folder, row)
    cut = tokenize(model_folder, row, length=whole.token_count - 2)
    assert cut.ids.tolist() == whole.ids.tolist()[:-2]
    assert (cut.truncated_rows, cut.skipped_rows, cut.longest_row_tokens) == (1, 0, whole.token_count)
    gone = tokenize(model_folder, row, length=3)
    assert (gone.count, gone.token_count, gone.skipped_rows, gone.rows) == (0, 0, 1, 1)
