"""Turns one parsed line into a typed row of the format that its keys name, with every error.

It knows no file and no tokenizer.
"""

from typing import Any

from services.trainer.train.data.rows.messages import (
    OUTPUT_ROLES,
    Refuse,
    call_ids,
    read_messages,
    read_text,
    read_tools,
)
from services.trainer.train.data.rows.row_types import (
    ROW_WEIGHT_MAX,
    Conversation,
    Features,
    Format,
    Instruction,
    Preference,
    Row,
    Text,
    Tokens,
)

# Keys with a meaning that a line of JSON cannot have here: to ignore them would train something else than what the row
# says.
_UNSUPPORTED_KEYS = {
    "functions": "no such key: declare functions as tools",
    "input_ids": "no such key: token ids come as a Parquet file",
    "labels": "no such key: token ids come as a Parquet file",
}
# Which key names which format; a row with keys of two formats is neither.
_FORMAT_KEYS: dict[Format, tuple[str, ...]] = {
    "conversation": ("messages",),
    "preference": ("input", "preferred_output", "non_preferred_output"),
    "instruction": ("prompt", "completion"),
    "text": ("text",),
}
_EXPECTED = (
    "a row of a known format: messages; prompt and completion; text; or input, preferred_output and "
    "non_preferred_output"
)


def format_of(document: dict[str, Any], refuse: Refuse) -> Format | None:
    """What the keys name, also of a row with errors."""
    named: list[Format] = [name for name, keys in _FORMAT_KEYS.items() if any(key in document for key in keys)]
    if not named:
        refuse("$", _EXPECTED)
        return None
    if len(named) > 1:
        refuse("$", f"a row of one format, not of {' and '.join(named)}")
        return None
    return named[0]


def format_of_row(row: Row) -> Format:
    match row:
        case Conversation():
            return "conversation"
        case Instruction():
            return "instruction"
        case Text():
            return "text"
        case Preference():
            return "preference"
        case Tokens():
            return "tokens"


def note_features(row: Row, features: Features) -> None:
    features.sample_weights |= row.weight != 1
    if isinstance(row, Conversation):
        messages = row.messages
    elif isinstance(row, Preference):
        messages = (*row.messages, *row.preferred_output, *row.non_preferred_output)
    else:
        return
    features.tools |= bool(row.tools)
    for message in messages:
        features.tools |= bool(message.tool_calls)
        features.parallel_tool_calls |= len(message.tool_calls) > 1
        features.reasoning |= message.reasoning is not None
        features.message_weights |= not message.weight


def read_row(line: int, document: dict[str, Any], kind: Format, refuse: Refuse) -> Row | None:
    """None when something is wrong; `refuse` was called for it."""
    for key, why in _UNSUPPORTED_KEYS.items():
        if key in document:
            refuse(f"$.{key}", why)
    if kind != "conversation" and document.get("tools") is not None:
        where = "input.tools" if kind == "preference" else "a row with messages"
        refuse("$.tools", f"no such key in a {kind} row: tools belong to {where}")
    weight = _weight(document.get("weight"), refuse)
    match kind:
        case "conversation":
            return _conversation(line, document, weight, refuse)
        case "preference":
            return _preference(line, document, weight, refuse)
        case "instruction":
            prompt = read_text(document.get("prompt"), "$.prompt", refuse, may_be_empty=True)
            completion = read_text(document.get("completion"), "$.completion", refuse, may_be_empty=False)
            if prompt is None or completion is None:
                return None
            return Instruction(line=line, prompt=prompt, completion=completion, weight=weight)
        case _:
            text = read_text(document.get("text"), "$.text", refuse, may_be_empty=False)
            return None if text is None else Text(line=line, text=text, weight=weight)


def _conversation(line: int, document: dict[str, Any], weight: float, refuse: Refuse) -> Conversation | None:
    tools = read_tools(document.get("tools"), "$.tools", refuse)
    messages = read_messages(document["messages"], "$.messages", refuse)
    if _lacks_assistant(document["messages"]):
        refuse("$.messages", "at least one message of the role assistant")
        return None
    return None if messages is None else Conversation(line=line, messages=messages, tools=tools, weight=weight)


def _preference(line: int, document: dict[str, Any], weight: float, refuse: Refuse) -> Preference | None:
    question = document.get("input")
    if not isinstance(question, dict):
        refuse("$.input", "an object with messages")
        question = None
    tools = read_tools((question or {}).get("tools"), "$.input.tools", refuse)
    messages = None
    if question is not None:
        messages = read_messages(question.get("messages"), "$.input.messages", refuse)
    if messages and messages[-1].role == "assistant":
        refuse("$.input.messages", "a last message that is not of the role assistant: the outputs go on from there")
    calls = call_ids(messages or ())
    outputs = []
    for key in ("preferred_output", "non_preferred_output"):
        value, path = document.get(key), f"$.{key}"
        outputs.append(read_messages(value, path, refuse, roles=OUTPUT_ROLES, known_calls=calls))
        if outputs[-1] and (outputs[-1][0].role != "assistant" or outputs[-1][-1].role != "assistant"):
            refuse(path, "messages that begin and end with the role assistant")
    preferred, non_preferred = outputs
    if messages is None or preferred is None or non_preferred is None:
        return None
    return Preference(
        line=line,
        messages=messages,
        preferred_output=preferred,
        non_preferred_output=non_preferred,
        tools=tools,
        weight=weight,
    )


def _lacks_assistant(messages: Any) -> bool:
    sound = isinstance(messages, list) and bool(messages)
    return sound and not any(isinstance(message, dict) and message.get("role") == "assistant" for message in messages)


def _weight(value: Any, refuse: Refuse) -> float:
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= ROW_WEIGHT_MAX:
        refuse("$.weight", f"a number from 0 to {ROW_WEIGHT_MAX:g}")
        return 1.0
    return float(value)
