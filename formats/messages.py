"""Reads the messages of a row from parsed JSON and reports everything that is wrong with them."""

from typing import Any

from formats.descriptions import describe, describe_entry, shown_key
from formats.fields import read_optional_text, read_text, unknown_keys
from formats.row_errors import LineFaults
from formats.rows import Message, ToolCall
from formats.strict_json import has_lone_surrogate
from formats.tools import read_tool_calls

ROLES = ("system", "user", "assistant", "tool")
# What the model answers is spoken by the model and by the tools that it called.
OUTPUT_ROLES = ("assistant", "tool")
# In the order in which people are told of them.
_KEYS = {
    "system": dict.fromkeys(("role", "content", "weight")),
    "user": dict.fromkeys(("role", "content", "weight")),
    "assistant": dict.fromkeys(("role", "content", "weight", "reasoning", "reasoning_content", "tool_calls")),
    "tool": dict.fromkeys(("role", "content", "weight", "tool_call_id", "name")),
}
_ANY_KEYS = dict.fromkeys(key for keys in _KEYS.values() for key in keys)


def read_messages(
    value: Any, path: str, faults: LineFaults, calls: set[str], *, messages_max: int, roles: tuple[str, ...] = ROLES
) -> tuple[Message, ...] | None:
    """None when something is wrong.

    `calls` holds the ids of the tool calls before these messages; the ids of their own sound calls are added to it.
    """
    if not isinstance(value, list) or not value:
        faults.add(path, "a list of at least one message", describe(value))
        return None
    if len(value) > messages_max:
        faults.add(path, f"at most {messages_max} messages", f"{len(value)} messages")
        return None
    messages = []
    for index, entry in enumerate(value):
        message = _plain_message(entry, index, roles) or _message(entry, path, index, roles, calls, faults)
        if message is not None:
            messages.append(message)
    return tuple(messages) if len(messages) == len(value) else None


def _plain_message(value: Any, index: int, roles: tuple[str, ...]) -> Message | None:
    """Most messages are a role and a text, and nothing can be wrong with them: they are read at once, for speed."""
    if not isinstance(value, dict) or len(value) != 2:
        return None
    role, content = value.get("role"), value.get("content")
    if not isinstance(content, str) or role not in roles or (index and role == "system") or has_lone_surrogate(content):
        return None
    return Message(role=role, content=content)


def _message(
    value: Any, parent: str, index: int, roles: tuple[str, ...], calls: set[str], faults: LineFaults
) -> Message | None:
    path = f"{parent}[{index}]"
    if not isinstance(value, dict):
        faults.add(path, "an object with role and content", describe(value))
        return None
    faults_before = faults.count
    role = _role(value, path, index, roles, faults)
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning = None
    if role == "assistant":
        tool_calls = read_tool_calls(value.get("tool_calls"), f"{path}.tool_calls", faults)
        reasoning = _reasoning(value, path, faults)
    content: str | None = ""
    if value.get("content") is not None or not (value.get("tool_calls") and role == "assistant"):
        content = read_text(value, "content", path, faults, may_be_empty=True)
    call_id, name = None, None
    if role == "tool":
        call_id = read_optional_text(value, "tool_call_id", path, faults)
        name = read_optional_text(value, "name", path, faults)
        if call_id is not None and call_id not in calls:
            expectation = "the id of a tool call in a message before this one"
            faults.add(f"{path}.tool_call_id", expectation, describe(call_id))
    weight = value.get("weight")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        faults.add(f"{path}.weight", "0 or 1", describe(weight))
    if faults.count > faults_before or role is None or content is None:
        return None
    # Only sound messages make calls that later ones may answer.
    calls.update(call.id for call in tool_calls if call.id is not None)
    return Message(
        role=role,
        content=content,
        weight=1 if weight is None else int(weight),
        reasoning=reasoning,
        tool_calls=tool_calls,
        tool_call_id=call_id,
        name=name,
    )


def _role(message: dict[str, Any], path: str, index: int, roles: tuple[str, ...], faults: LineFaults) -> str | None:
    """The role, after a check of the keys that a message of this role has."""
    role = message.get("role")
    if not isinstance(role, str) or role not in roles:
        role = None
    keys = _KEYS[role] if role else _ANY_KEYS
    for key in unknown_keys(message, keys.keys()):
        expectation = f"no such key: a message of the role {role or '...'} has {', '.join(keys)}"
        faults.add(f"{path}.{shown_key(key)}", expectation, "a key")
    if role is None:
        faults.add(f"{path}.role", f"one of {', '.join(roles)}", describe_entry(message, "role"))
    elif role == "system" and index > 0:
        faults.add(f"{path}.role", "a system message only as the first one", f"one at position {index + 1}")
    return role


def _reasoning(message: dict[str, Any], path: str, faults: LineFaults) -> str | None:
    """Two names for the same thing are in use."""
    key = "reasoning" if message.get("reasoning") is not None else "reasoning_content"
    if message.get(key) is None:
        return None
    if key == "reasoning" and message.get("reasoning_content") is not None:
        found = describe(message["reasoning_content"])
        faults.add(f"{path}.reasoning_content", "one of reasoning and reasoning_content, not both", found)
        return None
    return read_text(message, key, path, faults, may_be_empty=True) or None
