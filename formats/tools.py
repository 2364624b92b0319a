"""Reads the tools that a row declares and the calls that its messages make."""

from typing import Any

from formats.descriptions import describe, describe_entry, shown_key
from formats.fields import read_optional_text, read_text, said, unknown_keys
from formats.nulls import said_of_schema, said_throughout
from formats.row_errors import LineFaults
from formats.rows import TOOL_CALLS_MAX, TOOLS_MAX, ToolCall
from formats.strict_json import is_sound_json, strict_json

_SOUND_JSON = "text without unpaired surrogates, in brackets nested less deeply"
# Streamed calls carry their place in the list, also in what clients make of them.
_CALL_KEYS = frozenset({"id", "type", "function", "index"})
# OpenAI's client adds what it read from the arguments by a schema of its user, which says the same again.
_FUNCTION_KEYS = frozenset({"name", "arguments", "parsed_arguments"})


def read_tools(value: Any, path: str, faults: LineFaults) -> tuple[dict[str, Any], ...]:
    """The declarations as they are, but for keys that say nothing, for the template."""
    if value is None:
        return ()
    # So columns of Arrow hold them, which would give each tool the parameters of all others.
    entries = _json_in(value) if isinstance(value, str) else value
    if not isinstance(entries, list):
        faults.add(path, "a list of tools, or a string that holds one as JSON", describe(value))
        return ()
    if len(entries) > TOOLS_MAX:
        faults.add(path, f"at most {TOOLS_MAX} tools", f"{len(entries)} tools")
        return ()
    tools = [_tool(entry, f"{path}[{index}]", faults) for index, entry in enumerate(entries)]
    return tuple(tool for tool in tools if tool is not None)


def read_tool_calls(value: Any, path: str, faults: LineFaults) -> tuple[ToolCall, ...]:
    """The sound calls of one message."""
    if value is None:
        return ()
    if not isinstance(value, list):
        faults.add(path, "a list of tool calls", describe(value))
        return ()
    if len(value) > TOOL_CALLS_MAX:
        faults.add(path, f"at most {TOOL_CALLS_MAX} tool calls", f"{len(value)} tool calls")
        return ()
    calls = [_tool_call(entry, f"{path}[{index}]", faults) for index, entry in enumerate(value)]
    return tuple(call for call in calls if call is not None)


def _tool(value: Any, path: str, faults: LineFaults) -> dict[str, Any] | None:
    if not isinstance(value, dict) or not isinstance(value.get("function"), dict):
        faults.add(path, "an object with type and function", describe(value))
        return None
    if not is_sound_json(value) or (tool := said_of_schema(value)) is None:
        faults.add(path, _SOUND_JSON, describe(value))
        return None
    if tool.get("type") != "function":
        faults.add(f"{path}.type", '"function"', describe_entry(tool, "type"))
    function = tool["function"]
    read_text(function, "name", f"{path}.function", faults, may_be_empty=False)
    if not isinstance(function.get("description", ""), str):
        faults.add(f"{path}.function.description", "a string", describe(function["description"]))
    if not isinstance(function.get("parameters", {}), dict):
        found = describe(function["parameters"])
        faults.add(f"{path}.function.parameters", "a JSON schema, which is an object", found)
    return tool


def _tool_call(value: Any, path: str, faults: LineFaults) -> ToolCall | None:
    if not isinstance(value, dict) or not isinstance(value.get("function"), dict):
        faults.add(path, "an object with a function", describe(value))
        return None
    call = said(value)
    for key in unknown_keys(call, _CALL_KEYS):
        faults.add(path, "only the keys id, type and function", f"the key {shown_key(key)}")
    if call.get("type", "function") != "function":
        faults.add(f"{path}.type", '"function"', describe(call["type"]))
    index = call.get("index", 0)
    if isinstance(index, bool) or not isinstance(index, int):
        faults.add(f"{path}.index", "a whole number", describe(index))
    call_id = read_optional_text(call, "id", path, faults)
    function = said(call["function"])
    for key in unknown_keys(function, _FUNCTION_KEYS):
        faults.add(f"{path}.function", "only the keys name and arguments", f"the key {shown_key(key)}")
    name = read_text(function, "name", f"{path}.function", faults, may_be_empty=False)
    arguments = _arguments(function.get("arguments"), f"{path}.function.arguments", faults)
    return None if name is None or arguments is None else ToolCall(id=call_id, name=name, arguments=arguments)


def _arguments(value: Any, path: str, faults: LineFaults) -> dict[str, Any] | None:
    """A string is read as it is written. In an object a null says nothing, as everywhere in a row."""
    if value is None or value == "":
        return {}
    arguments = _json_in(value) if isinstance(value, str) else value
    if not isinstance(arguments, dict):
        faults.add(path, "a JSON object, or a string that holds one", describe(value))
        return None
    kept = None
    if is_sound_json(arguments):
        kept = arguments if isinstance(value, str) else said_throughout(arguments)
    if kept is None:
        faults.add(path, _SOUND_JSON, describe(value))
    return kept


def _json_in(text: str) -> Any:
    """None for what is no JSON."""
    try:
        return strict_json(text)
    except (ValueError, RecursionError):
        return None
