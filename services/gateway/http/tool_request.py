"""Reads which tools a model may call and which form its answer has to take. Not pure: protobuf."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from finemesh.inference.v1 import generation_pb2 as pb
from formats.row_errors import LineFaults, RowErrors
from formats.strict_json import is_sound_json
from formats.tools import read_tools
from services.gateway.http.openai_errors import bad_param, bad_params
from services.gateway.http.request_fields import read_part

_MODES = {
    "auto": pb.TOOL_CHOICE_MODE_AUTO,
    "none": pb.TOOL_CHOICE_MODE_NONE,
    "required": pb.TOOL_CHOICE_MODE_REQUIRED,
}
# What "auto" and "none" say of no tools is what happens anyway.
_WITHOUT_TOOLS = ("auto", "none")
_CHOICE = 'must be "none", "auto", "required" or {"type": "function", "function": {"name": "..."}}'
# `schema` stands beside the type in Together's requests, and in `json_schema` in OpenAI's.
_FORMAT_KEYS = frozenset({"type", "json_schema", "schema"})
# The name and the description are for OpenAI's model; a schema is enforced with and without `strict`.
_SCHEMA_KEYS = frozenset({"schema", "name", "description", "strict"})


def read_declarations(value: Any) -> list[pb.Tool]:
    """By the rules of a dataset's row, so that a tool is told to the model as it was in training."""
    errors = RowErrors()
    tools = read_tools(value, "tools", LineFaults(0, errors))
    if errors.count:
        raise bad_params(errors)
    return [pb.Tool(declaration=json.dumps(tool, ensure_ascii=False)) for tool in tools]


def read_tool_choice(value: Any, tools: Sequence[pb.Tool]) -> pb.ToolChoice | None:
    if value is None or (not tools and value in _WITHOUT_TOOLS):
        return None
    if not tools:
        raise bad_param("tool_choice", "must be left out without tools")
    if isinstance(value, str) and value in _MODES:
        return pb.ToolChoice(mode=_MODES[value])
    if not isinstance(value, dict) or value.get("type") != "function":
        raise bad_param("tool_choice", _CHOICE)
    name = read_part(value, "function", frozenset({"name"}), "tool_choice").get("name")
    if not isinstance(name, str) or name not in [json.loads(tool.declaration)["function"]["name"] for tool in tools]:
        raise bad_param("tool_choice.function.name", "must be the name of one of the tools")
    return pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_FUNCTION, function_name=name)


def read_response_format(fields: Mapping[str, Any]) -> pb.ResponseFormat | None:
    form = read_part(fields, "response_format", _FORMAT_KEYS)
    described = read_part(form, "json_schema", _SCHEMA_KEYS, "response_format")
    path, schema = "response_format.json_schema.schema", described.get("schema")
    if schema is None:
        path, schema = "response_format.schema", form.get("schema")
    if schema is not None and not (isinstance(schema, dict) and is_sound_json(schema)):
        raise bad_param(path, "must be a JSON schema, which is an object, in brackets nested less deeply")
    match form.get("type", "text"):
        case "text":
            if schema is not None:
                raise bad_param("response_format.type", 'must be "json_schema" where there is a schema')
            return None
        case "json_object" if schema is None:
            return pb.ResponseFormat(type=pb.RESPONSE_FORMAT_TYPE_JSON_OBJECT)
        case "json_object" | "json_schema" if schema is not None:
            text = json.dumps(schema, ensure_ascii=False)
            return pb.ResponseFormat(type=pb.RESPONSE_FORMAT_TYPE_JSON_SCHEMA, json_schema=text)
        case "json_schema":
            raise bad_param("response_format.json_schema.schema", "must be a JSON schema")
        case _:
            raise bad_param("response_format.type", "must be one of text, json_object, json_schema")
