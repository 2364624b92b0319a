"""Renders conversations by the base model's chat template and finds the characters that are trained.

It knows no tokenizer, and leaves the rendering to formats/prompts.
"""

from collections.abc import Sequence
from datetime import date
from functools import cached_property
from typing import Any

from formats.prompts.chat_template import TemplateRenderer
from formats.prompts.faults import RenderingRefused, broken_template
from formats.prompts.model_folder import ModelFolder
from formats.prompts.plain_messages import plain
from formats.rows import Conversation, Message, ToolCall
from services.trainer.train.data.tokens.base_tokenizer import models_fault, no_template
from services.trainer.train.data.tokens.template_coverage import TOOLS, TemplateRefusal, check_answer, check_context

Span = tuple[int, int]

# An opening of the last turn that a template leaves out of earlier ones, in characters.
OPENING_LENGTH_MAX = 256
# A tool, and an id of a call of it that strict templates take, to see what a template makes of them.
_TOOL = {"type": "function", "function": {"name": "lookup", "description": "", "parameters": {"type": "object"}}}
_CALL_ID = "call00001"


class ChatTemplate:
    """A compiled chat template. `special_tokens` are the names that templates use: bos_token, eos_token, ...

    `tools_source` renders conversations with tools, where a base model has a template of its own for them.
    """

    def __init__(
        self, source: str, special_tokens: dict[str, str], today: date, tools_source: str | None = None
    ) -> None:
        with models_fault():
            self._renderer = TemplateRenderer(source, special_tokens, today, tools_source)

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
        try:
            with models_fault():
                return self._renderer.render(
                    [plain(message) for message in messages], tools=tools, add_generation_prompt=add_generation_prompt
                )
        except RenderingRefused as refusal:
            raise TemplateRefusal(str(refusal)) from refusal

    def trained_spans(self, row: Conversation, *, train_on_inputs: bool) -> tuple[str, list[Span]]:
        """The whole text and the character spans that carry loss: what the assistant says after the generation prompt
        (reasoning, words and tool calls), with its end-of-turn marker. Messages of weight 0 carry none."""
        if row.tools and not self._takes_tools:
            raise TemplateRefusal("a chat template that takes tools; the one of this base model leaves them out", TOOLS)
        text = self.render(row.messages, tools=row.tools, add_generation_prompt=False)
        check_context(text, row.messages, row.tools)
        if train_on_inputs and all(message.weight for message in row.messages):
            for index, message in enumerate(row.messages):
                check_answer(text, index, message)
            return text, [(0, len(text))]
        spans: list[Span] = []
        start = 0
        for index, message in enumerate(row.messages):
            if not train_on_inputs and (message.role != "assistant" or not message.weight):
                continue
            if not train_on_inputs:
                prompt = self.render(row.messages[:index], tools=row.tools, add_generation_prompt=True) if index else ""
                start = _prefix_length(text, prompt, index)
            end = self._end(text, start, row, index)
            if message.weight:
                check_answer(text[start:end], index, message)
                spans.append((start, end))
            start = end
        return text, spans

    @cached_property
    def supports_tools(self) -> bool:
        """Whether a row with a tool, a call of it, its result and an answer can be trained."""
        call = ToolCall(id=_CALL_ID, name="lookup", arguments={"word": "finemesh"})
        calls = Message(role="assistant", content="", tool_calls=(call,))
        return self._trains(calls, Message(role="tool", content="a result", tool_call_id=_CALL_ID), tools=(_TOOL,))

    @cached_property
    def supports_reasoning(self) -> bool:
        """Whether a row whose last answer has reasoning can be trained."""
        return self._trains(reasoning="because of this")

    def _trains(self, *between: Message, tools: tuple[dict[str, Any], ...] = (), reasoning: str | None = None) -> bool:
        question, answer = (
            Message(role="user", content="question"),
            Message(role="assistant", content="answer", reasoning=reasoning),
        )
        try:
            self.trained_spans(
                Conversation(line=1, messages=(question, *between, answer), tools=tools), train_on_inputs=False
            )
        except TemplateRefusal:
            return False
        return True

    @cached_property
    def _takes_tools(self) -> bool:
        question = [Message(role="user", content="question")]
        try:
            with_tool = self.render(question, tools=[_TOOL], add_generation_prompt=True)
        except TemplateRefusal:
            # Rows that have tools get the reason of the refusal.
            return True
        return with_tool != self.render(question, add_generation_prompt=True)

    def _end(self, text: str, start: int, row: Conversation, index: int) -> int:
        """Where message `index`, which begins at `start`, ends in the whole text."""
        message = row.messages[index]
        alone = self.render(row.messages[: index + 1], tools=row.tools, add_generation_prompt=False)
        if text.startswith(alone) or message.role != "assistant" or not alone.startswith(text[:start]):
            return _prefix_length(text, alone, index)
        # Some templates open the last answer with a block of (empty) reasoning and leave it out of earlier ones. Such a
        # turn stands in the whole text as it stands alone, less that opening.
        body = message.content.strip() or (message.tool_calls[0].name if message.tool_calls else "")
        body_at = alone.find(body, start) if body else -1
        for opening_end in range(start, min(body_at, start + OPENING_LENGTH_MAX) + 1):
            if text.startswith(alone[opening_end:], start):
                return start + len(alone) - opening_end
        return _prefix_length(text, alone, index)


def _prefix_length(text: str, prefix: str, index: int) -> int:
    if not text.startswith(prefix):
        raise TemplateRefusal(
            f"a chat template that renders a conversation up to message {index} as the beginning of the whole",
            index,
        )
    return len(prefix)


def check_generation_prompt(template: ChatTemplate) -> None:
    """Refuses a template that cannot ask for an answer: there the mask would cover the answer's header and the tuned
    model would be asked in another way than it learned."""
    question = [Message(role="user", content="question")]
    with models_fault():
        try:
            with_prompt = template.render(question, add_generation_prompt=True)
            without = template.render(question, add_generation_prompt=False)
        except TemplateRefusal as refusal:
            raise broken_template(str(refusal)) from refusal
        if with_prompt == without:
            raise broken_template("it has no generation prompt (add_generation_prompt changes nothing)")
