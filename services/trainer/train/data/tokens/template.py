"""Renders conversations by the base model's chat template and finds the characters that are trained.

It knows no tokenizer, and leaves the rendering to formats/prompts.
"""

from collections.abc import Mapping, Sequence
from datetime import date
from functools import cache, cached_property
from typing import Any

from formats.prompts.chat_template import TemplateRenderer
from formats.prompts.faults import RenderingRefused, broken_template
from formats.prompts.model_folder import ModelFolder
from formats.prompts.plain_messages import plain
from formats.prompts.render_time import bounded_rendering
from formats.rows import Conversation, Message, ToolCall
from services.trainer.train.data.tokens.base_tokenizer import models_fault, no_template
from services.trainer.train.data.tokens.field_marks import Span
from services.trainer.train.data.tokens.spans import RenderedRow
from services.trainer.train.data.tokens.template_coverage import check_answer, check_context
from services.trainer.train.data.tokens.template_refusals import ANOTHER, TOOLS, TemplateRefusal
from services.trainer.train.data.tokens.turn_marks import CALL_ID, TOOL, TurnMarks

_QUESTION = Message(role="user", content="question")


class ChatTemplate:
    """A compiled chat template. `special_tokens` are the names that templates use: bos_token, eos_token, ...

    `tools_source` renders conversations with tools, where a base model has a template of its own for them.
    """

    def __init__(
        self, source: str, special_tokens: dict[str, str], today: date, tools_source: str | None = None
    ) -> None:
        with models_fault():
            self._renderer = TemplateRenderer(source, special_tokens, today, tools_source)
        self.turn_marks = TurnMarks(self.render_plain, special_tokens)
        self.sought_texts = cache(lambda with_tools: self._renderer.sought_texts(with_tools=with_tools))
        self.marks_generation = cache(lambda with_tools: self._renderer.marks_generation(with_tools=with_tools))

    @classmethod
    def of(cls, folder: ModelFolder, today: date) -> "ChatTemplate":
        """Raises Failure(user, MODEL_INVALID)."""
        if folder.template_source is None:
            raise no_template()
        return cls(folder.template_source, folder.special_tokens, today, folder.tools_template_source)

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: Sequence[dict[str, Any]] = ()
    ) -> str:
        """Raises TemplateRefusal, and Failure for a template that takes too long."""
        return self.render_plain([plain(message) for message in messages], add_generation_prompt, tools, {})

    def render_plain(
        self,
        messages: Sequence[Mapping[str, Any]],
        asking: bool,
        tools: Sequence[Mapping[str, Any]],
        variables: Mapping[str, str],
    ) -> str:
        """As `render`, of messages as templates take them. `asking` adds the generation prompt."""
        try:
            with models_fault():
                return self._renderer.render(messages, tools=tools, add_generation_prompt=asking, variables=variables)
        except RenderingRefused as refusal:
            raise TemplateRefusal(str(refusal)) from refusal

    def trained_spans(self, row: Conversation, *, train_on_inputs: bool) -> tuple[str, list[Span]]:
        """The whole text and the character spans that carry loss: what the assistant says after the prompt that a
        server renders for it (reasoning, words and tool calls), with what ends its turn. Messages of weight 0 carry
        none."""
        with models_fault(), bounded_rendering():
            return self._spans(row, train_on_inputs)

    def _spans(self, row: Conversation, train_on_inputs: bool) -> tuple[str, list[Span]]:
        if row.tools and not self._takes_tools:
            raise TemplateRefusal("a chat template that takes tools; the one of this base model leaves them out", TOOLS)
        entries = [plain(message) for message in row.messages]
        text = self.render_plain(entries, False, row.tools, {})
        check_context(text, row.messages, row.tools)
        rendered = RenderedRow(self, row, entries, text)
        if not train_on_inputs:
            return text, rendered.answer_spans()
        if not all(message.weight for message in row.messages):
            return text, rendered.message_spans()
        for index, message in enumerate(row.messages):
            check_answer(text, index, message)
        return text, [(0, len(text))]

    @cached_property
    def supports_tools(self) -> bool:
        """Whether a row with a tool, a call of it, its result and an answer can be trained."""
        call = ToolCall(id=CALL_ID, name="lookup", arguments={"word": "finemesh"})
        calls = Message(role="assistant", content="", tool_calls=(call,))
        return self._trains(calls, Message(role="tool", content="a result", tool_call_id=CALL_ID), tools=(TOOL,))

    @cached_property
    def supports_reasoning(self) -> bool:
        """Whether a row whose last answer has reasoning can be trained."""
        return self._trains(reasoning="because of this")

    def _trains(self, *between: Message, tools: tuple[dict[str, Any], ...] = (), reasoning: str | None = None) -> bool:
        answer = Message(role="assistant", content="answer", reasoning=reasoning)
        try:
            self.trained_spans(
                Conversation(line=1, messages=(_QUESTION, *between, answer), tools=tools), train_on_inputs=False
            )
        except TemplateRefusal:
            return False
        return True

    @cached_property
    def _takes_tools(self) -> bool:
        try:
            with_tool = self.render([_QUESTION], tools=[TOOL], add_generation_prompt=True)
        except TemplateRefusal:
            # Rows that have tools get the reason of the refusal.
            return True
        return with_tool != self.render([_QUESTION], add_generation_prompt=True)


def check_template(template: ChatTemplate) -> None:
    """Raises Failure(user, MODEL_INVALID) for a template under which no answer can be told from its question, or none
    ever ends: the tuned model would be asked in another way than it learned, or not stop."""
    answers = (
        Message(role="assistant", content="answer"),
        Message(role="assistant", content="answer", reasoning="thought"),
        Message(role="assistant", content="<think>\nthought\n</think>\n\nanswer"),
    )
    with models_fault():
        try:
            prompt = template.render([_QUESTION], add_generation_prompt=True)
            asks = prompt != template.render([_QUESTION], add_generation_prompt=False)
        except TemplateRefusal as refusal:
            raise broken_template(str(refusal)) from refusal
        refused: TemplateRefusal | None = None
        for answer in answers:
            row = Conversation(line=1, messages=(_QUESTION, answer))
            try:
                text, spans = template.trained_spans(row, train_on_inputs=False)
            except TemplateRefusal as refusal:
                refused = refused or refusal
                continue
            if why := _unfit(prompt, asks, text, spans):
                raise broken_template(why)
            return
        if refused is not None and not _refuses_itself(template):
            raise broken_template(f"no answer can be trained under it; expected {refused}")


def _unfit(prompt: str, asks: bool, text: str, spans: Sequence[Span]) -> str | None:
    said = "".join(text[start:end] for start, end in spans)
    before, _, behind = said.rpartition("answer")
    if not asks and before.strip():
        return f"it has no generation prompt, and begins answers with {before!r}: {ANOTHER}"
    if not prompt.rpartition("question")[2] and not before.strip():
        return f"it writes nothing between a question and its answer: {ANOTHER}"
    if not behind.strip():
        return f"it writes nothing behind an answer, so that a tuned model would never stop: {ANOTHER}"
    return None


def _refuses_itself(template: ChatTemplate) -> bool:
    """Whether it takes no such conversation at all: then rows get the reason that it gives."""
    try:
        template.render([_QUESTION, Message(role="assistant", content="answer")], add_generation_prompt=False)
    except TemplateRefusal:
        return True
    return False
