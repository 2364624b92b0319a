"""Renders conversations by the model's own chat template in jinja's sandbox and finds the characters that are trained.

It knows no tokenizer. The environment is the one transformers uses (same class, options, filters), with one difference:
the date is passed in, because a template that prints today's date would give a quote and a run different tokens.
"""

import json
from collections.abc import Sequence
from datetime import date
from functools import cached_property
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from formats.rows import Conversation, Message, ToolCall
from services.trainer.train.data.tokens.render_time import bounded_rendering
from services.trainer.train.data.tokens.template_coverage import TOOLS, TemplateRefusal, check_answer, check_context
from services.trainer.train.settings.failures import Failure, user_failure

Span = tuple[int, int]

TEMPLATE_LENGTH_MAX = 256 * 1024
# Characters of a template's own message about a row.
REFUSAL_LENGTH_MAX = 500
RENDERED_LENGTH_MAX = 64 * 1024 * 1024
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
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = today.strftime
        self._template = _compiled(environment, source)
        self._tools_template = self._template if tools_source is None else _compiled(environment, tools_source)
        self._special_tokens = special_tokens

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: Sequence[dict[str, Any]] = ()
    ) -> str:
        """Raises TemplateRefusal, and Failure for a template that takes too long."""
        try:
            with bounded_rendering():
                text = (self._tools_template if tools else self._template).render(
                    messages=[_plain(message) for message in messages],
                    tools=list(tools) or None,
                    documents=None,
                    add_generation_prompt=add_generation_prompt,
                    **self._special_tokens,
                )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            raise TemplateRefusal(
                f"a conversation that the chat template accepts: {str(error)[:REFUSAL_LENGTH_MAX]}"
            ) from error
        if len(text) > RENDERED_LENGTH_MAX:
            raise TemplateRefusal(f"a conversation of at most {RENDERED_LENGTH_MAX} rendered characters")
        return text

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


def _compiled(environment: ImmutableSandboxedEnvironment, source: str) -> Template:
    if len(source) > TEMPLATE_LENGTH_MAX:
        raise _broken(f"longer than {TEMPLATE_LENGTH_MAX} characters")
    try:
        # Constant expressions are computed while it is compiled.
        with bounded_rendering():
            return environment.from_string(source)
    except TemplateError as error:
        raise _broken(str(error)) from error


def _plain(message: Message) -> dict[str, Any]:
    """As the server hands it to the template: keys only for what is there, reasoning by both of its names."""
    plain: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning is not None:
        plain["reasoning"] = plain["reasoning_content"] = message.reasoning
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                **({} if call.id is None else {"id": call.id}),
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        plain["name"] = message.name
    return plain


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
    try:
        with_prompt = template.render(question, add_generation_prompt=True)
        without = template.render(question, add_generation_prompt=False)
    except TemplateRefusal as refusal:
        raise _broken(str(refusal)) from refusal
    if with_prompt == without:
        raise _broken("it has no generation prompt (add_generation_prompt changes nothing)")


class _GenerationBlock(Extension):
    """Accepts `{% generation %}`, which some templates put around the assistant's words, and renders what is inside."""

    tags = {"generation"}  # noqa: RUF012 - the attribute's shape is jinja's

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _broken(why: str) -> Failure:
    return user_failure("MODEL_INVALID", f"the base model's chat template cannot be used: {why}")
