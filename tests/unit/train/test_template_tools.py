"""Tools, tool results and reasoning in the templates of real families: what is trained, by hand; and the text, by
transformers."""

from datetime import date
from pathlib import Path
from typing import Any

import pytest

from formats.messages import read_messages
from formats.row_errors import LineFaults, RowErrors
from formats.rows import Conversation, Message, ToolCall
from services.trainer.train.data.tokens.template import ChatTemplate
from services.trainer.train.data.tokens.template_coverage import check_answer
from services.trainer.train.data.tokens.template_refusals import TemplateRefusal

TODAY = date(2024, 7, 26)
TEMPLATES = Path(__file__).parents[2] / "assets" / "templates"
QWEN3, LLAMA31 = ((TEMPLATES / f"{name}.jinja").read_text() for name in ("qwen3", "llama31"))
PLAIN = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% "
    "endif %}"
)
TOOL = {"type": "function", "function": {"name": "add", "description": "<sum>", "parameters": {"type": "object"}}}


def call(number: int, name: str = "add") -> dict[str, Any]:
    return {
        "id": f"c{number}",
        "type": "function",
        "function": {"name": name, "arguments": f'{{"b": {number}, "a": 1}}'},
    }


def messages_of(*entries: dict[str, Any]) -> tuple[Message, ...]:
    errors = RowErrors()
    messages = read_messages(list(entries), "$", LineFaults(1, errors), set(), messages_max=100)
    assert not errors.kept, errors.kept
    assert messages is not None
    return messages


def trained(source: str, *entries: dict[str, Any], tools: bool = True, inputs: bool = False) -> list[str]:
    row = Conversation(line=1, messages=messages_of(*entries), tools=(TOOL,) if tools else ())
    text, spans = ChatTemplate(source, {"bos_token": "<s>"}, TODAY).trained_spans(row, train_on_inputs=inputs)
    return [text[start:end] for start, end in spans]


USER = {"role": "user", "content": "1 + 2?"}
CALLS = {"role": "assistant", "content": None, "tool_calls": [call(1), call(2)]}
RESULTS = (
    {"role": "tool", "tool_call_id": "c1", "content": "two"},
    {"role": "tool", "tool_call_id": "c2", "content": "3"},
)
ANSWER = {"role": "assistant", "content": "It is 3."}


def test_parallel_tool_calls_are_trained_and_their_results_are_not() -> None:
    assert trained(QWEN3, USER, CALLS, *RESULTS, ANSWER) == [
        '<tool_call>\n{"name": "add", "arguments": {"b": 1, "a": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "add", "arguments": {"b": 2, "a": 1}}\n</tool_call><|im_end|>\n',
        "<think>\n\n</think>\n\nIt is 3.<|im_end|>\n",
    ]


def test_reasoning_of_every_step_after_the_question_is_trained() -> None:
    thinking = {**CALLS, "tool_calls": [call(1)], "reasoning": "call it"}
    assert trained(QWEN3, USER, thinking, RESULTS[0], {**ANSWER, "reasoning_content": "easy"}) == [
        '<think>\ncall it\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"b": 1, "a": '
        "1}}\n</tool_call><|im_end|>\n",
        "<think>\neasy\n</think>\n\nIt is 3.<|im_end|>\n",
    ]


def test_an_earlier_answer_that_the_template_renders_without_its_opening_is_trained_as_it_stands() -> None:
    assert trained(QWEN3, USER, ANSWER, USER, ANSWER, tools=False) == [
        "It is 3.<|im_end|>\n",
        "<think>\n\n</think>\n\nIt is 3.<|im_end|>\n",
    ]
    both = trained(QWEN3, USER, CALLS, *RESULTS, ANSWER, USER, ANSWER)
    assert [text.endswith("<|im_end|>\n") for text in both] == [True, True, True]
    assert both[0].startswith("<tool_call>")
    assert both[1] == "It is 3.<|im_end|>\n"


def test_reasoning_that_the_template_drops_is_refused_unless_it_is_not_trained() -> None:
    thought = {**ANSWER, "reasoning": "hm"}
    with pytest.raises(TemplateRefusal, match="reasoning of message 1"):
        trained(QWEN3, USER, thought, USER, ANSWER)
    assert len(trained(QWEN3, USER, {**thought, "weight": 0}, USER, ANSWER)) == 1
    with pytest.raises(TemplateRefusal, match="reasoning of message 1"):
        trained(PLAIN, USER, thought, tools=False)


def test_a_template_that_knows_no_tools_is_refused() -> None:
    with pytest.raises(TemplateRefusal, match="takes tools"):
        trained(PLAIN, USER, ANSWER)
    with pytest.raises(TemplateRefusal, match="tool calls of message 1"):
        trained(PLAIN, USER, {**CALLS, "content": "x"}, tools=False)


HEAD = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}"
CALLED = "{% for c in m.tool_calls or [] %}<{{ c.function.name }} {{ c.function.arguments | tojson }}>{% endfor %}"
ASK = "{% if add_generation_prompt %}[assistant]{% endif %}"


def template(said: str, *, roles: str = "m.role", head: str = HEAD) -> str:
    """One that says of a message what `said` does, for messages where `roles` is true."""
    return head + "{% for m in messages if " + roles + " %}[{{ m.role }}]" + said + "{% endfor %}" + ASK


WHOLE = template("{{ m.content }}" + CALLED)
ONE = {"role": "assistant", "content": None, "tool_calls": [call(1)]}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("source", "entries", "said"),
    [
        (
            template("{{ m.content }}" + CALLED, roles="m.role != 'tool'"),
            (USER, ONE, RESULTS[0], ANSWER),
            "content of message 2",
        ),
        (
            template("{{ m.content }}" + CALLED, roles="m.role != 'system'"),
            (SYSTEM, USER, ANSWER),
            "content of message 0",
        ),
        (template("{{ m.content }}"), (USER, {**ONE, "weight": 0}, RESULTS[0], ANSWER), "tool calls of message 1"),
        (
            template("{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"),
            (USER, ONE, RESULTS[0], ANSWER),
            "tool calls of message 1",
        ),
        (
            template(
                "{{ m.content }}" + CALLED,
                head="{% if tools and messages[0].role != 'system' %}" + HEAD + "{% endif %}",
            ),
            (SYSTEM, USER, ANSWER),
            "takes tools",
        ),
    ],
    ids=["result", "system", "call-without-loss", "arguments", "tools-beside-system"],
)  # fmt: skip
@pytest.mark.parametrize("inputs", [False, True], ids=["answers", "everything"])
def test_what_a_template_leaves_out_of_any_message_is_refused(
    source: str, entries: tuple[dict[str, Any], ...], said: str, inputs: bool
) -> None:
    assert trained(WHOLE, *entries, inputs=inputs)
    with pytest.raises(TemplateRefusal, match=said):
        trained(source, *entries, inputs=inputs)


def test_words_may_come_in_the_spelling_of_json() -> None:
    quoted = {"role": "tool", "tool_call_id": "c1", "content": 'the "sum"\nis é'}
    asked = {
        "id": "c1",
        "type": "function",
        "function": {"name": "add", "arguments": {"a": 'x "y"\n', "é": {"b": ["é"]}}},
    }
    source = template("{{ m.content | tojson }}" + CALLED)
    assert trained(source, USER, {**ONE, "tool_calls": [asked]}, quoted, ANSWER)
    ascii_only = template("{{ m.content | tojson(ensure_ascii=True) }}" + CALLED.replace("tojson", "string"))
    assert trained(ascii_only, USER, {**ONE, "tool_calls": [asked]}, quoted, ANSWER)


@pytest.mark.parametrize(
    ("source", "tools", "reasoning"),
    [(QWEN3, True, True), (LLAMA31, True, False), (PLAIN, False, False), (WHOLE, True, False)],
    ids=["qwen3", "llama31", "plain", "whole"],
)
def test_a_template_tells_what_it_supports(source: str, tools: bool, reasoning: bool) -> None:
    made = ChatTemplate(source, {"bos_token": "<s>"}, TODAY)
    assert (made.supports_tools, made.supports_reasoning) == (tools, reasoning)


def test_what_a_template_says_against_a_row_is_passed_on() -> None:
    with pytest.raises(TemplateRefusal, match="single tool-calls"):
        trained(LLAMA31, USER, CALLS, *RESULTS, ANSWER)
    one = {**CALLS, "tool_calls": [call(1)]}
    assert trained(LLAMA31, USER, one, RESULTS[0], ANSWER) == [
        '{"name": "add", "parameters": {"b": 1, "a": 1}}<|eot_id|>',
        "It is 3.<|eot_id|>",
    ]
    with pytest.raises(TemplateRefusal, match="content of message 1"):
        trained(LLAMA31, USER, {**one, "content": "words that this template forgets"}, RESULTS[0], ANSWER)


def test_training_on_inputs_takes_tools_and_results_too() -> None:
    (text,) = trained(QWEN3, USER, CALLS, *RESULTS, ANSWER, inputs=True)
    assert "<tools>" in text
    assert "<tool_response>\ntwo\n</tool_response>" in text


@pytest.mark.parametrize("source", [QWEN3, LLAMA31], ids=["qwen3", "llama31"])
def test_the_text_is_the_one_of_transformers(source: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    entries: list[dict[str, Any]] = [USER, {**CALLS, "content": "", "tool_calls": [call(1)]}, RESULTS[0], ANSWER]
    messages = messages_of(*entries)
    # As the server does before it renders: arguments are objects.
    parsed = {**call(1), "function": {"name": "add", "arguments": {"b": 1, "a": 1}}}
    theirs = [entries[0], {**entries[1], "tool_calls": [parsed]}, *entries[2:]]
    (expected,), _ = render_jinja_template([theirs], tools=[TOOL], chat_template=source, bos_token="<s>")
    ours = ChatTemplate(source, {"bos_token": "<s>"}, TODAY).render(messages, tools=[TOOL], add_generation_prompt=False)
    assert ours == expected


def test_deep_arguments_are_looked_through_without_recursion() -> None:
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    message = Message(role="assistant", content="", tool_calls=(ToolCall(name="add", arguments={"a": deep}),))
    check_answer("add a x", 1, message)
    with pytest.raises(TemplateRefusal, match="tool calls of message 1"):
        check_answer("add a y", 1, message)
