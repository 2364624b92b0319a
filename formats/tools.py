"""Reads the tools that a row declares and the calls that its messages make."""

from typing import Any

from formats.descriptions import describe, describe_entry, shown_key
from formats.fields import read_optional_text, read_text, unknown_keys
from formats.row_errors import LineFaults
from formats.rows import TOOL_CALLS_MAX, TOOLS_MAX, ToolCall
from formats.strict_json import is_sound_json, strict_json

_SOUND_JSON = "text without unpaired surrogates, in brackets nested less deeply"
_CALL_KEYS = frozenset({"id", "type", "function"})
_FUNCTION_KEYS = frozenset({"name", "arguments"})


def read_tools(value: Any, path: str, faults: LineFaults) -> tuple[dict[str, Any], ...]:
    """The declarations as they are, for the template."""
    if value is None:
        return ()
    if not isinstance(value, list):
        faults.add(path, "a list of tools", describe(value))
        return ()
    if len(value) > TOOLS_MAX:
        faults.add(path, f"at most {TOOLS_MAX} tools", f"{len(value)} tools")
        return ()
    for index, tool in enumerate(value):
        _check_tool(tool, f"{path}[{index}]", faults)
    return tuple(tool for tool in value if isinstance(tool, dict))


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


def _check_tool(tool: Any, path: str, faults: LineFaults) -> None:
    if not isinstance(tool, dict) or not isinstance(tool.get("function"), dict):
        faults.add(path, "an object with type and function", describe(tool))
        return
    if tool.get("type") != "function":
        faults.add(f"{path}.type", '"function"', describe_entry(tool, "type"))
    function = tool["function"]
    read_text(function, "name", f"{path}.function", faults, may_be_empty=False)
    if function.get("description") is not None and not isinstance(function["description"], str):
        faults.add(f"{path}.function.description", "a string", describe(function["description"]))
    if function.get("parameters") is not None and not isinstance(function["parameters"], dict):
        found = describe(function["parameters"])
        faults.add(f"{path}.function.parameters", "a JSON schema, which is an object", found)
    if not is_sound_json(tool):
        faults.add(path, _SOUND_JSON, describe(tool))


def _tool_call(value: Any, path: str, faults: LineFaults) -> ToolCall | None:
    if not isinstance(value, dict) or not isinstance(value.get("function"), dict):
        faults.add(path, "an object with a function", describe(value))
        return None
    for key in unknown_keys(value, _CALL_KEYS):
        faults.add(path, "only the keys id, type and function", f"the key {shown_key(key)}")
    if value.get("type") not in (None, "function"):
        faults.add(f"{path}.type", '"function"', describe(value["type"]))
    call_id = read_optional_text(value, "id", path, faults)
    function = value["function"]
    for key in unknown_keys(function, _FUNCTION_KEYS):
        faults.add(f"{path}.function", "only the keys name and arguments", f"the key {shown_key(key)}")
    name = read_text(function, "name", f"{path}.function", faults, may_be_empty=False)
    arguments = _arguments(function.get("arguments"), f"{path}.function.arguments", faults)
    return None if name is None or arguments is None else ToolCall(id=call_id, name=name, arguments=arguments)


def _arguments(value: Any, path: str, faults: LineFaults) -> dict[str, Any] | None:
    arguments = value
    if value is None or value == "":
        return {}
    if isinstance(value, str):
        try:
            arguments = strict_json(value)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        faults.add(path, "a JSON object, or a string that holds one", describe(value))
    elif not is_sound_json(arguments):
        faults.add(path, _SOUND_JSON, describe(value))
    else:
        return arguments
    return None
