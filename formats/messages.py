"""Reads messages from parsed JSON, of a dataset's row or of a chat request, and reports everything that is wrong with
them. A key whose value is null says nothing: so rows come from Arrow, and answers from OpenAI's client."""

from typing import Any

from formats.content import read_content
from formats.descriptions import describe, describe_entry, shown_key
from formats.fields import read_optional_text, read_text, said, unknown_keys
from formats.row_errors import LineFaults
from formats.rows import Message, ToolCall
from formats.strict_json import has_lone_surrogate
from formats.tools import read_tool_calls

ROLES = ("system", "developer", "user", "assistant", "tool")
# What the model answers is spoken by the model and by the tools that it called.
OUTPUT_ROLES = ("assistant", "tool")
# OpenAI's newer name for the same role.
_DEVELOPER = "developer"
# In the order in which people are told of them.
_SHARED = ("role", "content", "name", "weight")
_KEYS = {
    "assistant": dict.fromkeys((*_SHARED, "reasoning", "reasoning_content", "tool_calls")),
    "tool": dict.fromkeys((*_SHARED, "tool_call_id")),
}
_PLAIN_KEYS = dict.fromkeys(_SHARED)
_ANY_KEYS = dict.fromkeys(key for keys in _KEYS.values() for key in keys)
# Keys of answers as OpenAI's servers write them; empty, they say nothing either.
_EMPTY_KEYS = frozenset({"refusal", "annotations", "audio", "function_call", "tool_calls"})

# What OpenAI's client read from a content by a schema of its user: it says again what the content says.
_REPEATING_KEY = "parsed"


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
        message = _plain_message(entry, roles) or _message(entry, f"{path}[{index}]", roles, calls, faults)
        if message is not None:
            messages.append(message)
    return tuple(messages) if len(messages) == len(value) else None


def _plain_message(value: Any, roles: tuple[str, ...]) -> Message | None:
    """Most messages are a role and a text, and nothing can be wrong with them: they are read at once, for speed."""
    if not isinstance(value, dict) or len(value) != 2:
        return None
    role, content = value.get("role"), value.get("content")
    if not isinstance(content, str) or role not in roles or role == _DEVELOPER or has_lone_surrogate(content):
        return None
    return Message(role=role, content=content)


def _message(value: Any, path: str, roles: tuple[str, ...], calls: set[str], faults: LineFaults) -> Message | None:
    if not isinstance(value, dict):
        faults.add(path, "an object with role and content", describe(value))
        return None
    faults_before = faults.count
    message = said(value)
    role = _role(message, path, roles, faults)
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning = call_id = None
    if role == "assistant":
        tool_calls = read_tool_calls(message.get("tool_calls"), f"{path}.tool_calls", faults)
        reasoning = _reasoning(message, path, faults)
    content: str | None = ""
    if "content" in message or not (message.get("tool_calls") and role == "assistant"):
        content = read_content(message, path, faults)
    name = read_optional_text(message, "name", path, faults)
    if role == "tool":
        call_id = read_optional_text(message, "tool_call_id", path, faults)
        if call_id is not None and call_id not in calls:
            expectation = "the id of a tool call in a message before this one"
            faults.add(f"{path}.tool_call_id", expectation, describe(call_id))
    weight = message.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        faults.add(f"{path}.weight", "0 or 1", describe(weight))
    if faults.count > faults_before or role is None or content is None:
        return None
    # Only sound messages make calls that later ones may answer.
    calls.update(call.id for call in tool_calls if call.id is not None)
    return Message(
        role="system" if role == _DEVELOPER else role,
        content=content,
        weight=int(weight),
        reasoning=reasoning,
        tool_calls=tool_calls,
        tool_call_id=call_id,
        name=name,
    )


def _role(message: dict[str, Any], path: str, roles: tuple[str, ...], faults: LineFaults) -> str | None:
    """The role, after a check of the keys that a message of this role has."""
    role = message.get("role")
    if not isinstance(role, str) or role not in roles:
        role = None
    keys = _KEYS.get(role, _PLAIN_KEYS) if role else _ANY_KEYS
    for key in unknown_keys(message, keys.keys()):
        if (key in _EMPTY_KEYS and message[key] in ("", [], {})) or (key == _REPEATING_KEY and role == "assistant"):
            continue
        expectation = f"no such key: a message of the role {role or '...'} has {', '.join(keys)}"
        faults.add(f"{path}.{shown_key(key)}", expectation, "a key")
    if role is None:
        faults.add(f"{path}.role", f"one of {', '.join(roles)}", describe_entry(message, "role"))
    return role


def _reasoning(message: dict[str, Any], path: str, faults: LineFaults) -> str | None:
    """Two names for the same thing are in use."""
    key = "reasoning" if "reasoning" in message else "reasoning_content"
    if key not in message:
        return None
    if key == "reasoning" and message.get("reasoning_content", message[key]) != message[key]:
        found = describe(message["reasoning_content"])
        faults.add(f"{path}.reasoning_content", "the same as reasoning, or one of the two alone", found)
        return None
    return read_text(message, key, path, faults, may_be_empty=True) or None
