"""The rules for one parsed line of a dataset: its format by its keys, every fault by path, and the features that it uses.

The trainer reads rows by the same rules (a test holds the two against each other). It knows no file, no tokenizer and no store.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, NoReturn

Format = Literal["conversation", "instruction", "text", "preference", "tokens"]
Refuse = Callable[[str, str, str], None]

ROLES = ("system", "user", "assistant", "tool")
OUTPUT_ROLES = ("assistant", "tool")
ROW_WEIGHT_MAX = 100
TOOLS_MAX = 128
TOOL_CALLS_MAX = 128
SOUND_JSON = "text without unpaired surrogates, in brackets nested less deeply"

_MESSAGE_KEYS = {
    "system": ("role", "content", "weight"),
    "user": ("role", "content", "weight"),
    "assistant": ("role", "content", "weight", "reasoning", "reasoning_content", "tool_calls"),
    "tool": ("role", "content", "weight", "tool_call_id", "name"),
}
_ANY_MESSAGE_KEYS = tuple(dict.fromkeys(key for keys in _MESSAGE_KEYS.values() for key in keys))
# Keys with a meaning that a line of JSON cannot have here: to ignore them would train something else than what the line says.
_UNSUPPORTED_KEYS = {
    "functions": "no such key: declare functions as tools",
    "input_ids": "no such key: token ids come as a Parquet file",
    "labels": "no such key: token ids come as a Parquet file",
}
_FORMAT_KEYS: dict[Format, tuple[str, ...]] = {
    "conversation": ("messages",),
    "preference": ("input", "preferred_output", "non_preferred_output"),
    "instruction": ("prompt", "completion"),
    "text": ("text",),
}
_FOUND_CHARS_MAX = 80
_KEY_CHARS_MAX = 60
_WHOLE = "$"


@dataclass(kw_only=True, slots=True)
class Features:
    """What any row of a file makes use of; a weight counts when it is not 1."""

    tools: bool = False
    reasoning: bool = False
    message_weights: bool = False
    sample_weights: bool = False
    parallel_tool_calls: bool = False

    def used(self) -> tuple[str, ...]:
        """Names, in alphabetical order."""
        return tuple(sorted(feature.name for feature in fields(self) if getattr(self, feature.name)))


def check_row(document: dict[str, Any], messages_max: int, features: Features, refuse: Refuse) -> Format | None:
    """The recognised format, also of a line with errors; None when the line has no shape."""
    named: list[Format] = [name for name, keys in _FORMAT_KEYS.items() if any(key in document for key in keys)]
    if not named:
        expected = (
            "a row of a known format: the key `messages`, the keys `prompt` and `completion`, the key `text`, or "
        )
        refuse(_WHOLE, expected + "the keys `input`, `preferred_output` and `non_preferred_output`", describe(document))
        return None
    if len(named) > 1:
        refuse(_WHOLE, f"a row of one format, not of {' and '.join(named)}", describe(document))
        return None
    _RowCheck(messages_max, features, refuse).check(named[0], document)
    return named[0]


class _RowCheck:
    """One row."""

    def __init__(self, messages_max: int, features: Features, refuse: Refuse) -> None:
        self._messages_max = messages_max
        self._features = features
        self._refuse = refuse

    def check(self, kind: Format, document: dict[str, Any]) -> None:
        for key, why in _UNSUPPORTED_KEYS.items():
            if key in document:
                self._refuse(f"$.{key}", why, describe(document[key]))
        if kind != "conversation" and document.get("tools") is not None:
            where = "input.tools" if kind == "preference" else "a row with messages"
            why = f"no such key in a {kind} row: tools belong to {where}"
            self._refuse("$.tools", why, describe(document["tools"]))
        self._check_row_weight(document.get("weight"))
        match kind:
            case "conversation":
                self._check_conversation(document)
            case "preference":
                self._check_preference(document)
            case "instruction":
                for key in ("prompt", "completion"):
                    self._check_text(document, key, "$", may_be_empty=key == "prompt")
            case _:
                self._check_text(document, "text", "$", may_be_empty=False)

    def _check_row_weight(self, weight: Any) -> None:
        if weight is None:
            return
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= ROW_WEIGHT_MAX:
            self._refuse("$.weight", f"a number from 0 to {ROW_WEIGHT_MAX}", describe(weight))
        elif weight != 1:
            self._features.sample_weights = True

    def _check_conversation(self, document: dict[str, Any]) -> None:
        self._check_tools(document.get("tools"), "$.tools")
        messages = document["messages"]
        self._check_messages(messages, "$.messages", ROLES, set())
        sound = isinstance(messages, list) and messages
        if sound and not any(isinstance(message, dict) and message.get("role") == "assistant" for message in messages):
            self._refuse("$.messages", "at least one message of the role assistant", "none")

    def _check_preference(self, document: dict[str, Any]) -> None:
        question = document.get("input")
        calls: set[str] = set()
        if isinstance(question, dict):
            self._check_tools(question.get("tools"), "$.input.tools")
            messages: Any = question.get("messages")
            if self._check_messages(messages, "$.input.messages", ROLES, calls) and messages[-1]["role"] == "assistant":
                expected = "a last message that is not of the role assistant: the outputs go on from there"
                self._refuse("$.input.messages", expected, "one of the role assistant")
        else:
            self._refuse("$.input", "an object with messages", _given(document, "input"))
        for key in ("preferred_output", "non_preferred_output"):
            value: Any = document.get(key)
            path = f"$.{key}"
            sound = self._check_messages(value, path, OUTPUT_ROLES, set(calls))
            if sound and (value[0]["role"] != "assistant" or value[-1]["role"] != "assistant"):
                self._refuse(path, "messages that begin and end with the role assistant", "one of the role tool")

    def _check_messages(self, messages: Any, path: str, roles: tuple[str, ...], calls: set[str]) -> bool:
        """Whether all is well. `calls` are the ids of the tool calls so far; those of these messages are added."""
        if not isinstance(messages, list) or not messages:
            self._refuse(path, "a list of at least one message", describe(messages))
            return False
        if len(messages) > self._messages_max:
            self._refuse(path, f"at most {self._messages_max} messages", f"{len(messages)} messages")
            return False
        faults = [self._check_message(index, entry, path, roles, calls) for index, entry in enumerate(messages)]
        return not any(faults)

    def _check_message(self, index: int, message: Any, parent: str, roles: tuple[str, ...], calls: set[str]) -> int:
        """The number of faults."""
        path = f"{parent}[{index}]"
        if not isinstance(message, dict):
            self._refuse(path, "an object with role and content", describe(message))
            return 1
        faults = _Counted(self._refuse)
        role = message.get("role")
        role = role if isinstance(role, str) and role in roles else None
        keys = _MESSAGE_KEYS[role] if role else _ANY_MESSAGE_KEYS
        for key in sorted(message.keys() - set(keys)):
            expected = f"no such key: a message of the role {role or '...'} has {', '.join(keys)}"
            faults.refuse(f"{path}.{_printable(key)[:_KEY_CHARS_MAX]}", expected, "a key")
        if role is None:
            faults.refuse(f"{path}.role", f"one of {', '.join(roles)}", _given(message, "role"))
        elif role == "system" and index > 0:
            faults.refuse(f"{path}.role", "a system message only as the first one", f"one at position {index + 1}")
        if role == "assistant":
            self._check_spoken(message, path, calls, faults)
        if message.get("content") is not None or not (message.get("tool_calls") and role == "assistant"):
            _check_text(message, "content", path, faults.refuse, may_be_empty=True)
        if role == "tool":
            _check_optional_text(message, "tool_call_id", path, faults.refuse)
            _check_optional_text(message, "name", path, faults.refuse)
            call_id = message.get("tool_call_id")
            if isinstance(call_id, str) and call_id and not _has_lone_surrogate(call_id) and call_id not in calls:
                expected = "the id of a tool call in a message before this one"
                faults.refuse(f"{path}.tool_call_id", expected, describe(call_id))
        weight = message.get("weight")
        if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
            faults.refuse(f"{path}.weight", "0 or 1", describe(weight))
        elif weight == 0:
            self._features.message_weights = True
        if role == "assistant" and not faults.count:
            # Only sound messages make calls that later ones may answer.
            calls.update(call["id"] for call in message.get("tool_calls") or () if call.get("id") is not None)
        return faults.count

    def _check_spoken(self, message: dict[str, Any], path: str, calls: set[str], faults: "_Counted") -> None:
        tool_calls = message.get("tool_calls")
        if tool_calls is not None:
            _check_tool_calls(tool_calls, f"{path}.tool_calls", faults.refuse)
            self._features.tools |= bool(tool_calls)
            self._features.parallel_tool_calls |= isinstance(tool_calls, list) and len(tool_calls) > 1
        given = [key for key in ("reasoning", "reasoning_content") if message.get(key) is not None]
        if len(given) == 2:
            expected = "one of reasoning and reasoning_content, not both"
            faults.refuse(f"{path}.reasoning_content", expected, describe(message["reasoning_content"]))
        elif given:
            _check_text(message, given[0], path, faults.refuse, may_be_empty=True)
            self._features.reasoning |= bool(message[given[0]])

    def _check_tools(self, tools: Any, path: str) -> None:
        if tools is None:
            return
        if not isinstance(tools, list):
            self._refuse(path, "a list of tools", describe(tools))
            return
        if len(tools) > TOOLS_MAX:
            self._refuse(path, f"at most {TOOLS_MAX} tools", f"{len(tools)} tools")
            return
        self._features.tools |= bool(tools)
        for index, tool in enumerate(tools):
            _check_tool(tool, f"{path}[{index}]", self._refuse)

    def _check_text(self, document: dict[str, Any], key: str, parent: str, *, may_be_empty: bool) -> None:
        _check_text(document, key, parent, self._refuse, may_be_empty=may_be_empty)


class _Counted:
    """Counts what it passes on."""

    def __init__(self, refuse: Refuse) -> None:
        self.count = 0
        self._refuse = refuse

    def refuse(self, path: str, expectation: str, found: str) -> None:
        self.count += 1
        self._refuse(path, expectation, found)


def _check_tool_calls(calls: Any, path: str, refuse: Refuse) -> None:
    if not isinstance(calls, list):
        refuse(path, "a list of tool calls", describe(calls))
        return
    if len(calls) > TOOL_CALLS_MAX:
        refuse(path, f"at most {TOOL_CALLS_MAX} tool calls", f"{len(calls)} tool calls")
        return
    for index, call in enumerate(calls):
        _check_tool_call(call, f"{path}[{index}]", refuse)


def _check_tool_call(call: Any, path: str, refuse: Refuse) -> None:
    if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
        refuse(path, "an object with a function", describe(call))
        return
    for key in sorted(call.keys() - {"id", "type", "function"}):
        refuse(path, "only the keys id, type and function", f"the key {_printable(key)[:_KEY_CHARS_MAX]}")
    if call.get("type") not in (None, "function"):
        refuse(f"{path}.type", '"function"', describe(call["type"]))
    _check_optional_text(call, "id", path, refuse)
    function = call["function"]
    for key in sorted(function.keys() - {"name", "arguments"}):
        refuse(f"{path}.function", "only the keys name and arguments", f"the key {_printable(key)[:_KEY_CHARS_MAX]}")
    _check_text(function, "name", f"{path}.function", refuse, may_be_empty=False)
    _check_arguments(function.get("arguments"), f"{path}.function.arguments", refuse)


def _check_arguments(value: Any, path: str, refuse: Refuse) -> None:
    expected = "a JSON object, or a string that holds one"
    if value is None or value == "":
        return
    arguments = value
    if isinstance(value, str):
        try:
            arguments = strict_json(value)
        except (ValueError, RecursionError):
            refuse(path, expected, describe(value))
            return
    if not isinstance(arguments, dict):
        refuse(path, expected, describe(value))
    elif not _is_sound_json(arguments):
        refuse(path, SOUND_JSON, describe(value))


def _check_tool(tool: Any, path: str, refuse: Refuse) -> None:
    if not isinstance(tool, dict) or not isinstance(tool.get("function"), dict):
        refuse(path, "an object with type and function", describe(tool))
        return
    if tool.get("type") != "function":
        refuse(f"{path}.type", '"function"', _given(tool, "type"))
    function = tool["function"]
    _check_text(function, "name", f"{path}.function", refuse, may_be_empty=False)
    if function.get("description") is not None and not isinstance(function["description"], str):
        refuse(f"{path}.function.description", "a string", describe(function["description"]))
    if function.get("parameters") is not None and not isinstance(function["parameters"], dict):
        refuse(f"{path}.function.parameters", "a JSON schema, which is an object", describe(function["parameters"]))
    if not _is_sound_json(tool):
        refuse(path, SOUND_JSON, describe(tool))


def _check_optional_text(document: dict[str, Any], key: str, parent: str, refuse: Refuse) -> None:
    if document.get(key) is not None:
        _check_text(document, key, parent, refuse, may_be_empty=False)


def _check_text(document: dict[str, Any], key: str, parent: str, refuse: Refuse, *, may_be_empty: bool) -> None:
    value, path = document.get(key), f"{parent}.{key}"
    if not isinstance(value, str):
        refuse(path, "a string", _given(document, key))
    elif not value and not may_be_empty:
        refuse(path, "a string that is not empty", "an empty string")
    elif not value.isascii() and _has_lone_surrogate(value):
        # JSON can spell half of a surrogate pair; no tokenizer can read it.
        refuse(path, "text without unpaired surrogates", describe(value))


def strict_json(text: str) -> Any:
    """Raises ValueError, also for what Python's decoder takes or drops unless told otherwise: NaN, Infinity, numbers that only become
    infinite, and a key that comes twice, of which the first would be lost unseen."""
    return _DECODER.decode(text)


def _refuse_constant(name: str) -> NoReturn:
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
                raise ValueError(f"the key {name[:_KEY_CHARS_MAX]!a} twice in one object")
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


def _given(document: dict[str, Any], key: str) -> str:
    return describe(document[key]) if key in document else "nothing"


def describe(value: Any) -> str:
    """A short description that is safe to send and to print, whatever a file held."""
    if isinstance(value, str):
        shown = _printable(value[:_FOUND_CHARS_MAX])
        return f'"{shown}"' if len(value) <= _FOUND_CHARS_MAX else f'"{shown}…"'
    if isinstance(value, dict):
        keys = ", ".join(_printable(key[:_KEY_CHARS_MAX]) for key in list(value)[:4])
        return f"an object with the keys {keys}"[:_FOUND_CHARS_MAX] if value else "an empty object"
    if isinstance(value, list):
        return f"a list of {len(value)} items" if value else "an empty list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        # A number of thousands of digits is legal JSON and not legal to print.
        return f"the number {value}" if -(10**20) < value < 10**20 else "a huge number"
    return f"the number {value}"


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
