"""Renders conversations by the model's own chat template in jinja's sandbox and finds the characters that are trained.

It knows no tokenizer. The environment is the one transformers uses (same class, options, filters), with one difference:
the date is passed in, because a template that prints today's date would give a quote and a run different tokens.
"""

import json
from collections.abc import Sequence
from datetime import date
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from services.trainer.train.data import Conversation, Message
from services.trainer.train.failures import Failure, user_failure

Span = tuple[int, int]

TEMPLATE_LENGTH_MAX = 256 * 1024
RENDERED_LENGTH_MAX = 64 * 1024 * 1024


class TemplateRefusal(Exception):
    """This conversation does not fit the template; the text says why."""


class ChatTemplate:
    """A compiled chat template. `special_tokens` are the names that templates use: bos_token, eos_token, ..."""

    def __init__(self, source: str, special_tokens: dict[str, str], today: date) -> None:
        if len(source) > TEMPLATE_LENGTH_MAX:
            raise _broken(f"longer than {TEMPLATE_LENGTH_MAX} characters")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = today.strftime
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise _broken(str(error)) from error
        self._special_tokens = special_tokens

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """Raises TemplateRefusal."""
        plain = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = self._template.render(
                messages=plain,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            raise TemplateRefusal(f"a conversation that the chat template accepts: {error}") from error
        if len(text) > RENDERED_LENGTH_MAX:
            raise TemplateRefusal(f"a conversation of at most {RENDERED_LENGTH_MAX} rendered characters")
        return text

    def trained_spans(self, row: Conversation, *, train_on_inputs: bool) -> tuple[str, list[Span]]:
        """The whole text and the character spans that carry loss: what the assistant says after the generation prompt,
        with its end-of-turn marker. Messages of weight 0 carry none."""
        text = self.render(row.messages, add_generation_prompt=False)
        if train_on_inputs and all(message.weight for message in row.messages):
            return text, [(0, len(text))]
        spans: list[Span] = []
        start = 0
        for index, message in enumerate(row.messages):
            if message.role != "assistant" and not train_on_inputs:
                continue
            if message.role == "assistant" and not train_on_inputs:
                start = self._prefix(text, row.messages[:index], index, add_generation_prompt=True)
            end = self._prefix(text, row.messages[: index + 1], index, add_generation_prompt=False)
            if message.weight:
                spans.append((start, end))
            start = end
        return text, spans

    def _prefix(self, text: str, messages: Sequence[Message], index: int, *, add_generation_prompt: bool) -> int:
        prefix = self.render(messages, add_generation_prompt=add_generation_prompt) if messages else ""
        if not text.startswith(prefix):
            raise TemplateRefusal(
                f"a chat template that renders a conversation up to message {index} as the beginning of the whole"
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
