"""Which characters of a rendered conversation are trained, for the kinds of templates that families have: against
expectations by hand, and against the prompts of all answers, rendered one by one."""

import re
from collections.abc import Callable
from datetime import date
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from formats.rows import Conversation
from services.trainer.train.data.tokens.template import ChatTemplate, check_template
from services.trainer.train.data.tokens.template_refusals import TemplateRefusal
from tests.unit.train.family_rows import (
    TOKENS,
    TOOL,
    VISION_ONLY,
    calls,
    families,
    messages_of,
    result,
    said,
    shipped,
    system,
    user,
)

TODAY = date(2024, 7, 26)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ALTERNATE = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns have to alternate') }}{% endif %}"
)
# The question's end is all that asks for an answer, as in Mistral 7B, Llama 2 and CodeLlama.
NO_PROMPT = (
    "{{ bos_token }}{% for m in messages %}" + ALTERNATE + "{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
# The system message stands in the first question.
SYSTEM_INSIDE = (
    "{% set first = '' %}{% if messages[0].role == 'system' %}"
    "{% set first = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (first if loop.first else '') + m.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Tools stand before the last question alone.
TOOLS_LAST = (
    "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% if tools and m == asked[-1] %}{{ '[TOOLS]' + tools | tojson + '[/TOOLS]' }}{% endif %}"
    "{{ '[INST] ' + m.content + '[/INST]' }}{% elif m.role == 'tool' %}{{ '[RESULT]' + m.content + '[/RESULT]' }}"
    "{% elif m.tool_calls %}[CALLS]{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{{ eos_token }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
END_BEHIND_LAST = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
OPEN_THOUGHT = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{% endif %}{{ m.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)
SPLITS_THOUGHT = (
    "{% for m in messages %}{% set c = m.content %}{% set r = '' %}{% if '</think>' in c %}"
    "{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\\n') %}"
    "{% endif %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{{ ('<think>\\n' + r + '\\n</think>\\n\\n' if loop.last and r else '') }}"
    "{{ c + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}" + CHATML
)
# Marks inside of a macro, a filter and a set block, where the place in the output is not known while it is rendered.
MARKED = (
    "{% macro turn(m) %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}{% endmacro %}"
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role != 'assistant' %}{{ m.content }}<|end|>"
    "{% elif loop.index0 == 1 %}{{ turn(m) | trim }}{% elif loop.index0 == 3 %}"
    "{% set text %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}{% endset %}{{ text }}"
    "{% else %}{% filter trim %} {% generation %}{{ m.content }}<|end|>{% endgeneration %}{% endfilter %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ANSWERS = [user("Norway?"), said("Oslo"), user("Italy?"), said("Rome")]


def trained(source: str, *entries: dict[str, Any], tools: bool = False, inputs: bool = False) -> list[str]:
    row = Conversation(line=1, messages=messages_of(list(entries)), tools=(TOOL,) if tools else ())
    text, spans = ChatTemplate(source, TOKENS, TODAY).trained_spans(row, train_on_inputs=inputs)
    return [text[begin:end] for begin, end in spans]


@pytest.mark.parametrize(
    ("source", "entries", "expected"),
    [
        (NO_PROMPT, ANSWERS, [" Oslo</s>", " Rome</s>"]),
        (SYSTEM_INSIDE, [system("Be brief."), *ANSWERS], [" Oslo </s>", " Rome </s>"]),
        (END_BEHIND_LAST, ANSWERS, ["Oslo<|end|>\n", "Rome<|end|>\n</s>"]),
        (OPEN_THOUGHT, [user("?"), said("4", reasoning="2+2")], ["2+2\n</think>\n\n4<|im_end|>\n"]),
        (OPEN_THOUGHT, [user("?"), said("3", weight=0), user("?"), said("4")], ["\n</think>\n\n4<|im_end|>\n"]),
        (
            DEFAULT_SYSTEM,
            [said("Hello."), user("Open?"), said("Nine to five.")],
            ["Hello.<|im_end|>\n", "Nine to five.<|im_end|>\n"],
        ),
        (DEFAULT_SYSTEM, [system("Be brief."), said("Hello.")], ["Hello.<|im_end|>\n"]),
        (CHATML, [user("?"), said(" 3\n\n"), user("\n?\n"), said("")], [" 3\n\n<|im_end|>\n", "<|im_end|>\n"]),
        (CHATML, [user("?"), said(""), user("?"), said("4")], ["<|im_end|>\n", "4<|im_end|>\n"]),
        (CHATML, [user("?"), said("3"), said("4"), user("!")], ["3<|im_end|>\n", "4<|im_end|>\n"]),
        (MARKED, [*ANSWERS, user("Peru?"), said("Lima")], ["Oslo<|end|>", "Rome<|end|>", "Lima<|end|>"]),
        (MARKED, [user("a"), said("b", weight=0), user("c"), said("d"), user("e"), said("f", weight=0)], ["d<|end|>"]),
        (SPLITS_THOUGHT, [user("?"), said("<think>\nhm\n</think>\n\n4")], ["<think>\nhm\n</think>\n\n4<|im_end|>\n"]),
    ],
    ids=[
        "no-prompt", "system-inside", "end-behind-last", "open-thought", "open-thought-weight-0", "assistant-first",
        "system-then-assistant", "white-space", "empty-answer", "two-answers", "marked", "marked-weight-0",
        "inline-thought-as-rendered",
    ],
)  # fmt: skip
def test_what_is_trained(source: str, entries: list[dict[str, Any]], expected: list[str]) -> None:
    assert trained(source, *entries) == expected


@pytest.mark.parametrize(
    ("source", "entries", "tools", "why"),
    [
        (OPEN_THOUGHT, ANSWERS, False, "answer 1 .*asks with '<think>.*give earlier answers weight 0, or write a row"),
        (OPEN_THOUGHT, [said("Hello."), user("?"), said("4")], False, "answer 0.*weight 0, or begin with a question"),
        (SPLITS_THOUGHT, [user("?"), said("<think>2+2</think>4")], False, "put the thought into `reasoning`"),
        (TOOLS_LAST, [user("?"), said("1"), user("!"), said("2")], True, "asks with .TOOLS.*give earlier answers"),
        (CHATML, [user("?"), said("4", reasoning="2+2")], False, "leaves it out: import the model with another templ"),
        (
            END_BEHIND_LAST.replace("<|end|>\\n'", "'"), ANSWERS, False, "ends answer 1.*give earlier answers weight 0",
        ),
        (NO_PROMPT, [said("Hello."), user("?"), said("4")], False, "have to alternate"),
        (
            MARKED.replace("{% elif loop.index0 == 1 %}", "{% elif loop.index0 == 1 %}{{ m.content }}{% elif false %}"),
            ANSWERS, False, "marks answer 1",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_as_it_is_trained_is_refused(
    source: str, entries: list[dict[str, Any]], tools: bool, why: str
) -> None:
    with pytest.raises(TemplateRefusal, match=re.compile(why, re.S)):
        trained(source, *entries, tools=tools)


def test_a_thought_lost_in_the_context_of_a_trained_answer_is_refused() -> None:
    """The answer was asked for with the thought of the call before it, which is gone once another question came."""
    first = [user("1 + 2?"), calls(1, reasoning="Ask.", weight=0), result(1, "three"), said("3")]
    more = [user("And 1 more?"), said("4")]
    thought = shipped("qwen3")
    assert len(trained(thought, *first, tools=True)) == 1
    with pytest.raises(TemplateRefusal, match=r"before answer 3.*give earlier answers weight 0"):
        trained(thought, *first, *more, tools=True)
    # However many turns come before.
    with pytest.raises(TemplateRefusal, match=r"before answer 11.*give earlier answers weight 0"):
        trained(thought, *ANSWERS * 2, *first, *more, *ANSWERS, tools=True)


def test_a_template_without_a_generation_prompt_can_be_used() -> None:
    for source in (NO_PROMPT, SYSTEM_INSIDE, TOOLS_LAST):
        check_template(ChatTemplate(source, TOKENS, TODAY))
    tools = [user("?"), calls(1), result(1, "three"), said("3")]
    called = '[CALLS]{"name": "add", "arguments": {"a": 1, "word": "exactly"}}</s>'
    assert trained(TOOLS_LAST, *tools, tools=True) == [called, " 3</s>"]
    assert ChatTemplate(TOOLS_LAST, TOKENS, TODAY).supports_tools


def test_weights_hold_for_questions_when_inputs_are_trained() -> None:
    pieces = trained(NO_PROMPT, {**user("Norway?"), "weight": 0}, *ANSWERS[1:], inputs=True)
    assert pieces == [" Oslo</s>", "[INST] Italy? [/INST]", " Rome</s>"]
    assert trained(NO_PROMPT, *ANSWERS, inputs=True) == [
        "<s>[INST] Norway? [/INST] Oslo</s>[INST] Italy? [/INST] Rome</s>"
    ]


@pytest.mark.parametrize("kind", ["words", "calls"])
def test_the_work_grows_with_the_length_of_a_conversation(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Counted in messages that are handed to the template."""
    rendered: list[int] = []
    whole = ChatTemplate.render_plain

    def counted(self: ChatTemplate, messages: Any, *more: Any) -> str:
        rendered.append(len(messages))
        return whole(self, messages, *more)

    template = ChatTemplate(shipped("qwen3"), TOKENS, TODAY)
    turn = ANSWERS[:2] if kind == "words" else [user("?"), calls(1), result(1, "three"), said("3")]
    monkeypatch.setattr(ChatTemplate, "render_plain", counted)
    sizes = []
    for turns in (50, 240):
        rendered.clear()
        messages = messages_of(turn * turns)
        row = Conversation(line=1, messages=messages, tools=(TOOL,) if kind == "calls" else ())
        _, spans = template.trained_spans(row, train_on_inputs=False)
        assert len(spans) == turns * len(turn) // 2
        sizes.append(sum(rendered))
    assert sizes[1] - sizes[0] <= 5 * 190 * len(turn)


TEMPLATES: dict[str, Callable[[], str]] = {
    **{name: (lambda name=name: shipped(name)) for name in families() if name not in VISION_ONLY},  # type: ignore[misc]
    "no prompt": lambda: NO_PROMPT,
    "tools last": lambda: TOOLS_LAST,
    "splits thought": lambda: SPLITS_THOUGHT,
}
WORDS = st.sampled_from(
    ["", "yes", " yes\n", "a </think> b", "<think>hm</think>yes", "end", "<tool_response>x</tool_response>"]
)
THOUGHT = st.sampled_from([None, None, "hm", "so\n"])


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    entries = [system("Be brief.")] if draw(st.booleans()) else []
    number = 0
    for _ in range(draw(st.integers(1, 5))):
        entries += [user(draw(WORDS) or "?") for _ in range(draw(st.sampled_from([1, 1, 1, 2])))]
        for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
            number += 1
            entries.append(_thinking(calls(number, content=draw(WORDS)), draw))
            entries.append(result(number, draw(WORDS)))
        if draw(st.sampled_from([True, True, True, False])):
            entries.append(_thinking(said(draw(WORDS)), draw))
    if not any(entry["role"] == "assistant" for entry in entries):
        entries.append(said("yes"))
    return Conversation(line=1, messages=messages_of(entries), tools=(TOOL,) if number else ())


def _thinking(entry: dict[str, Any], draw: st.DrawFn) -> dict[str, Any]:
    thought = draw(THOUGHT)
    return {**entry, "weight": draw(st.sampled_from([1, 1, 0])), **({} if thought is None else {"reasoning": thought})}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(name=st.sampled_from(sorted(TEMPLATES)), row=conversations())
def test_every_answer_is_trained_behind_the_prompt_that_asks_for_it(name: str, row: Conversation) -> None:
    template = _template(name)
    learned = [index for index, each in enumerate(row.messages) if each.role == "assistant" and each.weight]
    try:
        text, spans = template.trained_spans(row, train_on_inputs=False)
    except TemplateRefusal:
        return
    assert text == template.render(row.messages, tools=row.tools, add_generation_prompt=False)
    assert len(spans) == len(learned)
    for number, (index, (begin, end)) in enumerate(zip(learned, spans, strict=True)):
        prompt = template.render(row.messages[:index], tools=row.tools, add_generation_prompt=True)
        assert text[:begin] == prompt
        assert row.messages[index].content.strip() in text[begin:end]
        alone = template.render(row.messages[: index + 1], tools=row.tools, add_generation_prompt=False)
        assert end == len(alone) or not text.startswith(alone)
        assert end <= (spans[number + 1][0] if number + 1 < len(spans) else len(text))
        if index < len(row.messages) - 1:
            # What follows begins as it does without the answer's words: nothing of the next turn is learned.
            following = row.messages[index + 1].content.strip()
            assert not following or text.find(following, end) >= 0


_made: dict[str, ChatTemplate] = {}


def _template(name: str) -> ChatTemplate:
    if name not in _made:
        _made[name] = ChatTemplate(TEMPLATES[name](), TOKENS, TODAY)
    return _made[name]
