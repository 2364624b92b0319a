"""What the process that reads answers is asked. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from services.inference.engines.answer_form import AnswerForm, ResponseKind

# Of models that write OpenAI's harmony format: one parser reads calls and thoughts, and binds a form without losing
# them, because the format says where an answer begins.
HARMONY = frozenset({"openai", "openai_gptoss"})


def keeps_thoughts(reasoning_parser: str, *, guided: bool) -> bool:
    """Whether an answer has thoughts to read: a grammar that binds its tokens from the first one on leaves none."""
    return bool(reasoning_parser) and (not guided or reasoning_parser in HARMONY)


class Refused(Exception):
    """An answer of this form cannot be given; `field` of the request says why."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


def packed_form(form: AnswerForm) -> dict[str, Any]:
    """The form as a question carries it."""
    return {
        "tools": [dict(tool) for tool in form.tools],
        "tool_use": form.tool_use,
        "function": form.function,
        "parallel": form.parallel_tool_calls,
        "response": form.response,
        "schema": form.json_schema,
        "guided": form.is_guided,
        "must_call": form.must_call,
        "enable_thinking": form.enable_thinking,
    }


def form_fields(form: Mapping[str, Any]) -> dict[str, Any]:
    """The packed form as fields of a request to OpenAI's API, which vLLM's parsers read."""
    fields: dict[str, Any] = {"parallel_tool_calls": form["parallel"]}
    if form["tools"]:
        named = {"type": "function", "function": {"name": form["function"]}}
        fields["tools"] = form["tools"]
        fields["tool_choice"] = named if form["function"] else form["tool_use"]
    if form["response"] == ResponseKind.JSON_OBJECT:
        fields["response_format"] = {"type": "json_object"}
    elif form["response"] == ResponseKind.JSON_SCHEMA:
        schema = {"name": "answer", "schema": json.loads(form["schema"])}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    return fields
