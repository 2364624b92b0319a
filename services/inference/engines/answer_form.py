"""What form an answer has to take: a bare text, calls of tools, JSON. Pure.

It refuses to know how a model is made to keep it.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class ToolUse(enum.StrEnum):
    """Whether an answer may, must not or must call a tool."""

    AUTO = "auto"
    NONE = "none"
    REQUIRED = "required"


class ResponseKind(enum.StrEnum):
    """Any text, one JSON object, or JSON that a schema allows."""

    TEXT = "text"
    JSON_OBJECT = "json_object"
    JSON_SCHEMA = "json_schema"


@dataclass(frozen=True, kw_only=True)
class AnswerForm:
    """Of an answer in a conversation. `function` is the one tool that must be called, with REQUIRED only."""

    tools: tuple[Mapping[str, Any], ...] = ()
    tool_use: ToolUse = ToolUse.AUTO
    function: str | None = None
    parallel_tool_calls: bool = True
    response: ResponseKind = ResponseKind.TEXT
    # The text of the schema, with JSON_SCHEMA only.
    json_schema: str = ""
    enable_thinking: bool | None = None

    @property
    def must_call(self) -> bool:
        return self.tool_use is ToolUse.REQUIRED

    @property
    def calls_tools(self) -> bool:
        """Whether calls of tools are looked for in the answer."""
        return bool(self.tools) and self.tool_use is not ToolUse.NONE

    @property
    def is_guided(self) -> bool:
        """Whether the choice of tokens is bound to a grammar."""
        return self.must_call or self.response is not ResponseKind.TEXT

    @property
    def ends_by_grammar(self) -> bool:
        """Whether a grammar can leave the end as the only token that may follow."""
        return self.is_guided or (self.calls_tools and not self.parallel_tool_calls)


@dataclass(frozen=True, kw_only=True)
class AnswerParsers:
    """vLLM's names of the parsers of a model's family; empty for none."""

    tool: str = ""
    reasoning: str = ""


NO_PARSERS = AnswerParsers()
