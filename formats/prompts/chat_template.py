"""Compiles a model's own chat template in jinja's sandbox and renders conversations by it.

It knows no tokenizer and no mask. The environment is the one transformers uses (same class, options, filters), with one
difference: the date is passed in, because a template that prints today's date would give a quote and a run different
tokens.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import date
from types import MappingProxyType
from typing import Any

from jinja2 import Template, TemplateError, nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from formats.prompts.faults import RenderingRefused, broken_template
from formats.prompts.render_time import bounded_rendering

TEMPLATE_LENGTH_MAX = 256 * 1024
# Characters of a template's own message about a conversation.
REFUSAL_LENGTH_MAX = 500
RENDERED_LENGTH_MAX = 64 * 1024 * 1024
# Variables of a rendering that shows which of its text is inside of `{% generation %}`: what is written around it.
GENERATION_BEGIN = "_generation_begin"
GENERATION_END = "_generation_end"
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


NO_SWITCHES: Mapping[str, bool] = MappingProxyType({})
NO_VARIABLES: Mapping[str, str] = MappingProxyType({})
Bound = Callable[[], AbstractContextManager[None]]


class TemplateRenderer:
    """A compiled chat template. `special_tokens` are the names that templates use: bos_token, eos_token, ...

    `tools_source` renders conversations with tools, where a model has a template of its own for them. Compiling and
    rendering happen within `bound`, for callers that no other limit ends.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        today: date,
        tools_source: str | None = None,
        *,
        bound: Bound = bounded_rendering,
    ) -> None:
        environment = template_environment(today)
        self._template = compiled(environment, source, bound)
        self._tools_template = self._template if tools_source is None else compiled(environment, tools_source, bound)
        self._environment = environment
        self._sources = (source, source if tools_source is None else tools_source)
        self._special_tokens = dict(special_tokens)
        self._bound = bound

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] = (),
        switches: Mapping[str, bool] = NO_SWITCHES,
        variables: Mapping[str, str] = NO_VARIABLES,
    ) -> str:
        """`messages` as in plain_messages.py; `switches` as callers set them (enable_thinking), by names that are none
        of the others; `variables` besides the special tokens or in their place. Raises RenderingRefused, and ModelFault
        for a template that takes too long."""
        try:
            with self._bound():
                text = (self._tools_template if tools else self._template).render(
                    messages=list(messages),
                    tools=list(tools) or None,
                    documents=None,
                    add_generation_prompt=add_generation_prompt,
                    **{**self._special_tokens, **variables},
                    **switches,
                )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            words = str(error)[:REFUSAL_LENGTH_MAX]
            raise RenderingRefused(f"a conversation that the chat template accepts: {words}", words) from error
        if len(text) > RENDERED_LENGTH_MAX:
            raise RenderingRefused(f"a conversation of at most {RENDERED_LENGTH_MAX} rendered characters")
        return text

    def marks_generation(self, *, with_tools: bool) -> bool:
        """Whether the template says itself what the model generates."""
        return _GENERATION_TAG.search(self._sources[with_tools]) is not None

    def sought_texts(self, *, with_tools: bool) -> frozenset[str]:
        """What the template may look for in the words of a message, such as `</think>`: the texts that it compares with
        or hands to a filter or a method."""
        tree = self._environment.parse(self._sources[with_tools])
        compared = tree.find_all(nodes.Compare)
        sought = [each for node in compared for each in (node.expr, *(operand.expr for operand in node.ops))]
        sought += [argument for node in tree.find_all(nodes.Call) for argument in node.args]
        sought += [argument for node in tree.find_all(nodes.Filter) for argument in node.args]
        return frozenset(
            node.value
            for node in sought
            if isinstance(node, nodes.Const) and isinstance(node.value, str) and len(node.value.strip()) > 1
        )


def template_environment(today: date) -> ImmutableSandboxedEnvironment:
    """As transformers makes it; `today` is what `strftime_now` tells."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = today.strftime
    return environment


def compiled(environment: ImmutableSandboxedEnvironment, source: str, bound: Bound = bounded_rendering) -> Template:
    """Raises ModelFault."""
    if len(source) > TEMPLATE_LENGTH_MAX:
        raise broken_template(f"longer than {TEMPLATE_LENGTH_MAX} characters")
    try:
        # Constant expressions are computed while it is compiled.
        with bound():
            template = environment.from_string(source)
    except TemplateError as error:
        raise broken_template(str(error)) from error
    # Every rendering copies them, which takes a plain dictionary a fraction of the time.
    template.globals = dict(template.globals)
    return template


class GenerationBlock(Extension):
    """Takes `{% generation %}`, which some templates put around the assistant's words, as transformers does: a block
    with names of its own. What stands around it in the text says where it is, also where a macro or a filter passes the
    text on."""

    tags = {"generation"}  # noqa: RUF012 - the attribute's shape is jinja's

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_generated"), [], [], body).set_lineno(line)

    @pass_context
    def _generated(self, context: Context, caller: Callable[[], str]) -> str:
        return f"{context.get(GENERATION_BEGIN, '')}{caller()}{context.get(GENERATION_END, '')}"


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
