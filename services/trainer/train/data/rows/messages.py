"""Reads the messages and tools of a row from parsed JSON and reports everything that is wrong with them.

It knows no file.
"""

import json
import math
from collections.abc import Callable
from typing import Any

from services.trainer.train.data.rows.row_types import MESSAGES_MAX, TOOL_CALLS_MAX, TOOLS_MAX, Message, ToolCall

Refuse = Callable[[str, str], None]

ROLES = ("system", "user", "assistant", "tool")
# What the model answers is spoken by the model and by the tools that it called.
OUTPUT_ROLES = ("assistant", "tool")
_KEYS = {
    "system": ("role", "content", "weight"),
    "user": ("role", "content", "weight"),
    "assistant": ("role", "content", "weight", "reasoning", "reasoning_content", "tool_calls"),
    "tool": ("role", "content", "weight", "tool_call_id", "name"),
}
_ANY_KEYS = tuple(dict.fromkeys(key for keys in _KEYS.values() for key in keys))
_KEY_LENGTH_SHOWN = 60
SOUND_JSON = "text without unpaired surrogates, in brackets nested less deeply"


def read_messages(
    value: Any, path: str, refuse: Refuse, *, roles: tuple[str, ...] = ROLES, known_calls: frozenset[str] | None = None
) -> tuple[Message, ...] | None:
    """None when something is wrong. `known_calls` are ids of tool calls before these messages."""
    if not isinstance(value, list) or not value:
        refuse(path, "a list of at least one message")
        return None
    if len(value) > MESSAGES_MAX:
        refuse(path, f"at most {MESSAGES_MAX} messages")
        return None
    calls = set(known_calls or ())
    messages = []
    for index, entry in enumerate(value):
        message = _message(entry, f"{path}[{index}]", index, roles, calls, refuse)
        if message is not None:
            messages.append(message)
            calls.update(call.id for call in message.tool_calls if call.id is not None)
    return tuple(messages) if len(messages) == len(value) else None


def call_ids(messages: tuple[Message, ...]) -> frozenset[str]:
    return frozenset(call.id for message in messages for call in message.tool_calls if call.id is not None)


def read_tools(value: Any, path: str, refuse: Refuse) -> tuple[dict[str, Any], ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        refuse(path, "a list of tools")
        return ()
    if len(value) > TOOLS_MAX:
        refuse(path, f"at most {TOOLS_MAX} tools")
        return ()
    for index, tool in enumerate(value):
        _check_tool(tool, f"{path}[{index}]", refuse)
    return tuple(tool for tool in value if isinstance(tool, dict))


def read_text(value: Any, path: str, refuse: Refuse, *, may_be_empty: bool) -> str | None:
    if not isinstance(value, str):
        refuse(path, "a string")
        return None
    if not value and not may_be_empty:
        refuse(path, "a string that is not empty")
        return None
    if not value.isascii() and _has_lone_surrogate(value):
        # JSON can spell half of a surrogate pair; no tokenizer can read it.
        refuse(path, "text without unpaired surrogates")
        return None
    return value


def _message(
    value: Any, path: str, index: int, roles: tuple[str, ...], calls: set[str], refuse: Refuse
) -> Message | None:
    if not isinstance(value, dict):
        refuse(path, "an object with role and content")
        return None
    wrong = 0

    def note(where: str, expected: str) -> None:
        nonlocal wrong
        wrong += 1
        refuse(where, expected)

    role = value.get("role")
    role = role if isinstance(role, str) and role in roles else None
    keys = _KEYS[role] if role else _ANY_KEYS
    for key in sorted(value.keys() - set(keys)):
        shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in key)
        note(
            f"{path}.{shown[:_KEY_LENGTH_SHOWN]}",
            f"no such key: a message of the role {role or '...'} has {', '.join(keys)}",
        )
    if role is None:
        note(f"{path}.role", f"one of {', '.join(roles)}")
    elif role == "system" and index > 0:
        note(f"{path}.role", "a system message only as the first one")
    tool_calls = _tool_calls(value.get("tool_calls"), f"{path}.tool_calls", note) if role == "assistant" else ()
    reasoning = _reasoning(value, path, note) if role == "assistant" else None
    content: str | None = ""
    if value.get("content") is not None or not (value.get("tool_calls") and role == "assistant"):
        content = read_text(value.get("content"), f"{path}.content", note, may_be_empty=True)
    call_id, name = None, None
    if role == "tool":
        call_id = _optional_text(value, "tool_call_id", path, note)
        name = _optional_text(value, "name", path, note)
        if call_id is not None and call_id not in calls:
            note(f"{path}.tool_call_id", "the id of a tool call in a message before this one")
    weight = value.get("weight")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        note(f"{path}.weight", "0 or 1")
    if wrong or role is None or content is None:
        return None
    return Message(
        role=role,
        content=content,
        weight=1 if weight is None else int(weight),
        reasoning=reasoning,
        tool_calls=tool_calls,
        tool_call_id=call_id,
        name=name,
    )


def _reasoning(message: dict[str, Any], path: str, refuse: Refuse) -> str | None:
    """Two names for the same thing are in use."""
    given = [key for key in ("reasoning", "reasoning_content") if message.get(key) is not None]
    if len(given) == 2:
        refuse(f"{path}.reasoning_content", "one of reasoning and reasoning_content, not both")
        return None
    if not given:
        return None
    return read_text(message[given[0]], f"{path}.{given[0]}", refuse, may_be_empty=True) or None


def _optional_text(message: dict[str, Any], key: str, path: str, refuse: Refuse) -> str | None:
    value = message.get(key)
    return None if value is None else read_text(value, f"{path}.{key}", refuse, may_be_empty=False)


def _tool_calls(value: Any, path: str, refuse: Refuse) -> tuple[ToolCall, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        refuse(path, "a list of tool calls")
        return ()
    if len(value) > TOOL_CALLS_MAX:
        refuse(path, f"at most {TOOL_CALLS_MAX} tool calls")
        return ()
    calls = [_tool_call(entry, f"{path}[{index}]", refuse) for index, entry in enumerate(value)]
    return tuple(call for call in calls if call is not None)


def _tool_call(value: Any, path: str, refuse: Refuse) -> ToolCall | None:
    if not isinstance(value, dict) or not isinstance(value.get("function"), dict):
        refuse(path, "an object with a function")
        return None
    for key in sorted(value.keys() - {"id", "type", "function"}):
        refuse(path, f"only the keys id, type and function, not {key[:_KEY_LENGTH_SHOWN]!a}")
    if value.get("type") not in (None, "function"):
        refuse(f"{path}.type", '"function"')
    call_id = _optional_text(value, "id", path, refuse)
    function = value["function"]
    for key in sorted(function.keys() - {"name", "arguments"}):
        refuse(f"{path}.function", f"only the keys name and arguments, not {key[:_KEY_LENGTH_SHOWN]!a}")
    name = read_text(function.get("name"), f"{path}.function.name", refuse, may_be_empty=False)
    arguments = _arguments(function.get("arguments"), f"{path}.function.arguments", refuse)
    return None if name is None or arguments is None else ToolCall(id=call_id, name=name, arguments=arguments)


def _arguments(value: Any, path: str, refuse: Refuse) -> dict[str, Any] | None:
    expected = "a JSON object, or a string that holds one"
    if value is None or value == "":
        return {}
    if isinstance(value, str):
        try:
            value = strict_json(value)
        except (ValueError, RecursionError):
            refuse(path, expected)
            return None
    if not isinstance(value, dict):
        refuse(path, expected)
        return None
    if not _is_sound_json(value):
        refuse(path, SOUND_JSON)
        return None
    return value


def _check_tool(tool: Any, path: str, refuse: Refuse) -> None:
    if not isinstance(tool, dict) or not isinstance(tool.get("function"), dict):
        refuse(path, "an object with type and function")
        return
    if tool.get("type") != "function":
        refuse(f"{path}.type", '"function"')
    function = tool["function"]
    read_text(function.get("name"), f"{path}.function.name", refuse, may_be_empty=False)
    if function.get("description") is not None and not isinstance(function["description"], str):
        refuse(f"{path}.function.description", "a string")
    if function.get("parameters") is not None and not isinstance(function["parameters"], dict):
        refuse(f"{path}.function.parameters", "a JSON schema, which is an object")
    if not _is_sound_json(tool):
        refuse(path, SOUND_JSON)


def strict_json(text: str) -> Any:
    """Raises ValueError, also for what Python's decoder takes or drops unless told otherwise: NaN, Infinity, numbers
    that only become infinite, and a key that comes twice, of which the first would be lost unseen."""
    return _DECODER.decode(text)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name}, which is no JSON")


def _finite(number: str) -> float:
    value = float(number)
    if math.isinf(value):
        raise ValueError("a number too large to be held")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the key {name[:_KEY_LENGTH_SHOWN]!a} twice in one object")
            seen.add(name)
    return found


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique)


def _is_sound_json(value: Any) -> bool:
    try:
        return not _has_lone_surrogate(json.dumps(value, ensure_ascii=False))
    except RecursionError:
        return False


def _has_lone_surrogate(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False
