"""What is trained under the chat templates of real families, against the marks that other people put into them, and
against the prompts that a server renders.

A row is judged when both templates give the same text. Of a mark the part that the prompt writes is left out: a header
is never the model's to say. All judged rows are trained as marked; all others are refused for a reason listed here, or
have another text, listed as well.
"""

import re
from dataclasses import dataclass
from datetime import date, datetime

import pytest
from transformers.utils import chat_template_utils

from formats.rows import Conversation
from services.trainer.train.data.tokens.template import ChatTemplate
from services.trainer.train.data.tokens.template_refusals import TemplateRefusal
from tests.unit.train import family_rows
from tests.unit.train.family_rows import ENTRIES, TOKENS, TOOL_ROWS, VISION_ONLY, families, marked, row, shipped

TODAY = date(2024, 7, 26)
ALL_ROWS = tuple(ENTRIES)
REASONING = ("reasoning", "reasoning turns", "reasoning last", "reasoning tools")
NO_REASONING = tuple(name for name in ALL_ROWS if name not in (*REASONING, "inline thought", "assistant first"))
NEMOTRON = ("nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra")
QWEN35 = ("qwen3_5_nothink", "qwen3_5_think", "qwen3_6")
ASKING_DEEPSEEK = ("deepseek_r1_distill", "deepseekv3")


@dataclass(frozen=True)
class Refused:
    """Rows that are refused, whose words hold `words`, under the templates of these families."""

    why: str
    words: str
    families: tuple[str, ...]
    rows: tuple[str, ...]

    def pairs(self) -> set[tuple[str, str]]:
        return {(family, name) for family in self.families for name in self.rows}


BOTH = (
    Refused(
        "the template knows no tools", "takes tools",
        ("cohere", "cohere2", *ASKING_DEEPSEEK, "gemma", "gemma3", "llama3", "phi3", "phi3_5", "qwen2_5_vl"), TOOL_ROWS,
    ),
    Refused("it renders tools, but no calls", "renders the tool calls", ("lfm2",), TOOL_ROWS),
    Refused("it renders the first call alone", "renders the tool calls", ("gptoss",), ("parallel calls",)),
    Refused("it leaves out the words beside a call", "content of message 1", ("muse_glimmer",), ("tools and words",)),
    Refused(
        "the template knows no reasoning", "leaves it out.*another template",
        ("cohere", "cohere2", "gemma", "gemma3", "lfm2", "lfm2_v2", "llama3", "phi3", "phi3_5", "qwen2_5",
         "qwen2_5_vl", "qwen3_instruct_2507", "qwen3_vl"), ("reasoning", "reasoning last"),
    ),
    Refused(
        "the same of a first answer", "leaves it out.*give earlier answers weight 0",
        ("cohere", "cohere2", "gemma", "gemma3", "gptoss", "lfm2", "lfm2_v2", "llama3", "phi3", "phi3_5", "qwen2_5",
         "qwen2_5_vl", "qwen3_instruct_2507", "qwen3_vl", "diffusion_gemma", "glm4moe"), ("reasoning turns",),
    ),
    Refused(
        "the same of a call", "leaves it out.*give earlier answers weight 0",
        ("lfm2_v2", "qwen2_5", "qwen3_instruct_2507", "qwen3_vl"), ("reasoning tools",),
    ),
    Refused("turns must alternate", "must alternate", ("cohere", "cohere2", "gemma3"), ("assistant first", "users")),
    Refused("turns must alternate", "must alternate", ("gemma",), ("assistant first", "users")),
    Refused("no system message", "System role", ("gemma",), ("system", "empty system")),
    Refused("it writes a thought in its own way", "put the thought into", ("glm4moe",), ("inline thought",)),
    Refused(
        "the prompt opens a thought, which the conversation closes or leaves out: rows need reasoning",
        "asks for that answer", NEMOTRON, (*NO_REASONING, "reasoning turns"),
    ),
    Refused("the prompt closes an empty thought: rows with a thought", "asks for that answer", ("qwen3_5_nothink",),
            (*REASONING, "inline thought")),
    Refused("the prompt opens a thought, which the conversation has not", "asks for that answer", ASKING_DEEPSEEK,
            tuple(name for name in ALL_ROWS if name not in (*TOOL_ROWS, "inline thought", "assistant first"))),
    Refused("the same", "asks for that answer", ("deepseekv3",), ("inline thought",)),
    Refused("no prompt for a first answer, and no header like that of one", "begin with a question",
            (*ASKING_DEEPSEEK, *NEMOTRON), ("assistant first",)),
    Refused("a tool's answer is followed by no header in a prompt, but by one in the conversation",
            "asks for answer [34] with", ("diffusion_gemma",), ("tools", "parallel calls", "reasoning tools")),
    Refused("words beside a call end the turn in a prompt, but not in the conversation", "asks for that answer",
            ("diffusion_gemma",), ("tools and words",)),
    Refused("words or thoughts beside a call are gone as soon as there is an answer", "leave out of earlier messages",
            ("gptoss",), ("tools and words", "reasoning tools")),
)  # fmt: skip
SHIPPED = (
    *BOTH,
    Refused("the same", "put the thought into", ("deepseek_r1_distill",), ("inline thought",)),
    Refused("earlier answers end with a token that ends no generation", "ends answer", ("gptoss",),
            ("several turns", "assistant first")),
    Refused("earlier answers have no thought, for which the prompt asks", "give earlier answers weight 0", QWEN35,
            ("several turns", "reasoning turns")),
    Refused("the same of a first answer", "begin with a question", QWEN35, ("assistant first",)),
    Refused("a thought is dropped as soon as there is another question", "leaves it out", ("qwen3",),
            ("reasoning turns",)),
)  # fmt: skip
# The marked template keeps what the shipped one leaves out of earlier turns, or ends turns that have no end there.
OTHER_TEXT = {
    *(("qwen3", name) for name in ("several turns", "last turn", "assistant first", "reasoning last")),
    *(("qwen3", name) for name in ("tools", "tools and words", "parallel calls")),
    *((family, name) for family in QWEN35 for name in ("last turn", "reasoning last")),
    *(("glm4moe", name) for name in ALL_ROWS if name not in ("reasoning turns", "inline thought")),
}


class _Clock(datetime):
    @classmethod
    def now(cls, tz: object = None) -> "_Clock":
        return cls(TODAY.year, TODAY.month, TODAY.day)


@pytest.fixture(autouse=True)
def same_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template_utils, "datetime", _Clock)


@pytest.mark.parametrize("family", [family for family in families() if family not in VISION_ONLY])
@pytest.mark.parametrize("kind", ["shipped", "marked"])
def test_rows_are_trained_as_marked_or_refused_on_purpose(family: str, kind: str) -> None:
    source, refusals = (shipped(family), SHIPPED) if kind == "shipped" else (marked(family), BOTH)
    template = ChatTemplate(source, TOKENS, TODAY)
    expected = {name: each.words for each in refusals for owner, name in each.pairs() if owner == family}
    for name in ALL_ROWS:
        asked = row(name)
        try:
            text, spans = template.trained_spans(asked, train_on_inputs=False)
        except TemplateRefusal as refusal:
            assert name in expected, f"{name}: {refusal}"
            assert re.search(expected[name], str(refusal)), f"{name}: {refusal}"
            continue
        assert name not in expected, name
        prompts = served_prompts(source, asked)
        assert all(text.startswith(prompt) for prompt in prompts), name
        starts = {len(prompt) for prompt in prompts}
        # Where the template marks answers in pieces, the first piece may begin later.
        begins = {begin for begin, _ in spans}
        assert starts <= begins or kind == "marked", name
        their_text, marks = family_rows.transformers_marks(marked(family), asked)
        if their_text != text:
            assert kind == "shipped" and (family, name) in OTHER_TEXT, name
            continue
        assert (family, name) not in OTHER_TEXT or kind == "marked", name
        assert characters(spans) == judged(marks, asked, text, template, source), name


def test_no_family_is_forgotten() -> None:
    named = {owner for each in SHIPPED for owner, _ in each.pairs()} | {family for family, _ in OTHER_TEXT}
    assert named <= set(families())
    assert set(VISION_ONLY) <= set(families())
    assert len(families()) > 25


@pytest.mark.parametrize("family", VISION_ONLY)
def test_templates_that_take_lists_of_parts_alone_lose_no_text_silently(family: str) -> None:
    template = ChatTemplate(shipped(family), TOKENS, TODAY)
    with pytest.raises(TemplateRefusal, match=r"content of message 0|accepts"):
        template.trained_spans(row("one turn"), train_on_inputs=False)


def served_prompts(source: str, asked: Conversation) -> list[str]:
    """Of the answers that are learned and that somebody can ask for."""
    return [
        family_rows.served_prompt(source, asked.messages[:index], asked.tools)
        for index, message in enumerate(asked.messages)
        if index and message.role == "assistant" and message.weight
    ]


def characters(spans: list[tuple[int, int]]) -> set[int]:
    return {character for begin, end in spans for character in range(begin, end)}


def judged(
    marks: list[tuple[int, int]], asked: Conversation, text: str, template: ChatTemplate, source: str
) -> set[int]:
    """The marked characters of answers that are learned, without what their prompts write."""
    written = [len(prompt) for prompt in served_prompts(source, asked)]
    if asked.messages[0].role == "assistant":
        question = row("one turn").messages[:1]
        ended = template.render(question, add_generation_prompt=False)
        header = template.render(question, add_generation_prompt=True).removeprefix(ended.removesuffix("</s>"))
        written.append(text.index(header) + len(header))
    learned: set[int] = set()
    for begin, end in marks:
        learned |= set(range(max([begin, *(each for each in written if begin < each < end)]), end))
    unlearned = next((index for index, each in enumerate(asked.messages) if not each.weight), None)
    return learned if unlearned is None else {character for character in learned if character >= min(written)}
