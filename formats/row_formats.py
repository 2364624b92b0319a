"""Turns one parsed line into a typed row of the format that its keys name, with every error."""

from dataclasses import replace
from typing import Any

from formats.descriptions import describe, describe_entry
from formats.fields import read_text
from formats.foreign_rows import foreign_row
from formats.messages import OUTPUT_ROLES, read_messages
from formats.row_errors import LineFaults, RowErrors
from formats.rows import (
    ROW_WEIGHT_MAX,
    Conversation,
    Features,
    Feedback,
    Format,
    Instruction,
    Message,
    Preference,
    Row,
    Text,
)
from formats.tools import read_tools

# Keys with a meaning that a line of JSON cannot have here: to ignore them would train something else than the row says.
_UNSUPPORTED_KEYS = {
    "functions": "no such key: declare functions as tools",
    "input_ids": "no such key: token ids come as a Parquet file",
    "labels": "no such key: token ids come as a Parquet file",
}
# Which key names which format; a row with keys of two formats is neither.
_FORMAT_OF_KEY: dict[str, Format] = {
    "messages": "conversation",
    "input": "preference",
    "preferred_output": "preference",
    "non_preferred_output": "preference",
    "prompt": "instruction",
    "completion": "instruction",
    "text": "text",
}
_KNOWN_FORMATS = (
    "a row of a known format: the key `messages`, the keys `prompt` and `completion`, also with `label`, "
    "the key `text`, or the keys `input`, `preferred_output` and `non_preferred_output`"
)


def format_of(document: dict[str, Any], faults: LineFaults, told: set[str]) -> Format | None:
    """What the keys name, also of a row with errors. `told` are the foreign formats that the file was found to have:
    each is one error, however many such rows follow."""
    named = {_FORMAT_OF_KEY[key] for key in document if key in _FORMAT_OF_KEY}
    foreign = None if len(named) == 1 and _is_whole(document) else foreign_row(document)
    if foreign is not None:
        if foreign.name not in told:
            told.add(foreign.name)
            expectation = f"a row of a format known here, not {foreign.name}; write {foreign.cure}"
            faults.add("$", expectation, describe(document))
        return None
    if len(named) != 1:
        expectation = f"a row of one format, not of {' and '.join(_in_order(named))}" if named else _KNOWN_FORMATS
        faults.add("$", expectation, describe(document))
        return None
    (kind,) = named
    return "feedback" if kind == "instruction" and "label" in document else kind


def _is_whole(document: dict[str, Any]) -> bool:
    """Whether the row has what a format asks for; whatever stands beside that is ignored."""
    if "prompt" in document and "completion" in document:
        return isinstance(document["prompt"], str) or "label" in document
    if "input" in document:
        return "preferred_output" in document or "non_preferred_output" in document
    return "messages" in document or "text" in document


def _in_order(named: set[Format]) -> list[Format]:
    return [kind for kind in dict.fromkeys(_FORMAT_OF_KEY.values()) if kind in named]


def read_row(line: int, document: dict[str, Any], kind: Format, faults: LineFaults, messages_max: int) -> Row | None:
    """The row, perhaps with parts missing when `faults` got any; None when it cannot be made."""
    for key, why in _UNSUPPORTED_KEYS.items():
        if key in document:
            faults.add(f"$.{key}", why, describe(document[key]))
    takes_tools = kind == "conversation" or (kind == "feedback" and isinstance(document.get("prompt"), list))
    if not takes_tools and document.get("tools") is not None:
        where = "input.tools" if kind == "preference" else "a row with messages"
        faults.add("$.tools", f"no such key in a {kind} row: tools belong to {where}", describe(document["tools"]))
    weight = _row_weight(document.get("weight"), faults)
    match kind:
        case "conversation":
            return _conversation(line, document, weight, faults, messages_max)
        case "preference":
            return _preference(line, document, weight, faults, messages_max)
        case "feedback":
            return _feedback(line, document, weight, faults, messages_max)
        case "instruction":
            return _instruction(line, document, weight, faults)
        case _:
            text = read_text(document, "text", "$", faults, may_be_empty=False)
            return None if text is None else Text(line=line, text=text, weight=weight)


def note_features(row: Row, features: Features) -> None:
    """Adds what a sound row uses."""
    features.sample_weights |= row.weight != 1
    asked = 0
    if isinstance(row, Feedback):
        features.thumbs_up |= row.label
        features.thumbs_down |= not row.label
        row = row.example
    if isinstance(row, Conversation):
        messages, asked = row.messages, row.asked
    elif isinstance(row, Preference):
        messages = (*row.messages, *row.preferred_output, *row.non_preferred_output)
    else:
        return
    if row.tools:
        features.tools = True
    for index, message in enumerate(messages):
        if message.tool_calls:
            features.tools = True
            features.parallel_tool_calls |= len(message.tool_calls) > 1
        if message.reasoning is not None:
            features.reasoning = True
        if not message.weight and index >= asked:
            features.message_weights = True


def check_file(kind: Format | None, features: Features, errors: RowErrors) -> None:
    """What only a whole file can show, once all of its rows were read and none has an error."""
    if errors.count:
        return
    if kind is None:
        errors.add(1, "$", "at least one row; the file is empty")
    if kind != "feedback" or (features.thumbs_up and features.thumbs_down):
        return
    expectation = (
        "rows with label true and rows with label false, because feedback teaches by both: add rows of the other kind, "
        "or train on good answers alone with the method sft, without the key `label`"
    )
    errors.add(0, "$.label", expectation, f"only rows with label {'true' if features.thumbs_up else 'false'}")


def _instruction(line: int, document: dict[str, Any], weight: float, faults: LineFaults) -> Instruction | None:
    prompt = read_text(document, "prompt", "$", faults, may_be_empty=True)
    completion = read_text(document, "completion", "$", faults, may_be_empty=False)
    if prompt is None or completion is None:
        return None
    return Instruction(line=line, prompt=prompt, completion=completion, weight=weight)


def _conversation(
    line: int, document: dict[str, Any], weight: float, faults: LineFaults, messages_max: int
) -> Conversation | None:
    tools = read_tools(document.get("tools"), "$.tools", faults)
    entries = document["messages"]
    messages = read_messages(entries, "$.messages", faults, set(), messages_max=messages_max)
    if isinstance(entries, list) and entries and not any(_is_answer(entry) for entry in entries):
        faults.add("$.messages", "at least one message of the role assistant", "none")
        return None
    return None if messages is None else Conversation(line=line, messages=messages, tools=tools, weight=weight)


def _is_answer(entry: Any) -> bool:
    return isinstance(entry, dict) and entry.get("role") == "assistant"


def _preference(
    line: int, document: dict[str, Any], weight: float, faults: LineFaults, messages_max: int
) -> Preference | None:
    question = document.get("input")
    tools: tuple[dict[str, Any], ...] = ()
    messages, calls = None, set[str]()
    if isinstance(question, dict):
        tools = read_tools(question.get("tools"), "$.input.tools", faults)
        messages = _question(question.get("messages"), "$.input.messages", faults, calls, messages_max)
    else:
        faults.add("$.input", "an object with messages", describe_entry(document, "input"))
    preferred, non_preferred = (
        _output(document.get(key), f"$.{key}", faults, set(calls), messages_max)
        for key in ("preferred_output", "non_preferred_output")
    )
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


def _feedback(
    line: int, document: dict[str, Any], weight: float, faults: LineFaults, messages_max: int
) -> Feedback | None:
    label = document["label"]
    example: Conversation | Instruction | None = None
    if not isinstance(label, bool):
        faults.add("$.label", "true for a good answer or false for a bad one", describe(label))
    if isinstance(document.get("prompt"), list):
        example = _judged_conversation(line, document, weight, faults, messages_max)
    elif isinstance(document.get("completion"), list):
        expectation = "a list of messages, as the completion is"
        faults.add("$.prompt", expectation, describe_entry(document, "prompt"))
    else:
        example = _instruction(line, document, weight, faults)
    return None if example is None or not isinstance(label, bool) else Feedback(example=example, label=label)


def _judged_conversation(
    line: int, document: dict[str, Any], weight: float, faults: LineFaults, messages_max: int
) -> Conversation | None:
    calls = set[str]()
    tools = read_tools(document.get("tools"), "$.tools", faults)
    messages = _question(document["prompt"], "$.prompt", faults, calls, messages_max)
    output = _output(document.get("completion"), "$.completion", faults, calls, messages_max)
    if messages is None or output is None:
        return None
    return answered(line, messages, output, tools, weight, ("prompt", "completion"))


def answered(
    line: int,
    question: tuple[Message, ...],
    output: tuple[Message, ...],
    tools: tuple[dict[str, Any], ...],
    weight: float,
    keys: tuple[str, str],
) -> Conversation:
    """A conversation in which nothing but the answer is learned. `keys` say where question and answer stand."""
    return Conversation(
        line=line,
        messages=(*(replace(message, weight=0) for message in question), *output),
        tools=tools,
        weight=weight,
        answer=keys[1],
        asked=len(question),
        question=keys[0],
    )


def _question(
    value: Any, path: str, faults: LineFaults, calls: set[str], messages_max: int
) -> tuple[Message, ...] | None:
    messages = read_messages(value, path, faults, calls, messages_max=messages_max)
    if messages and messages[-1].role == "assistant":
        expectation = "a last message that is not of the role assistant: the outputs go on from there"
        faults.add(path, expectation, "one of the role assistant")
    return messages


def _output(
    value: Any, path: str, faults: LineFaults, calls: set[str], messages_max: int
) -> tuple[Message, ...] | None:
    output = read_messages(value, path, faults, calls, messages_max=messages_max, roles=OUTPUT_ROLES)
    if output and (output[0].role != "assistant" or output[-1].role != "assistant"):
        faults.add(path, "messages that begin and end with the role assistant", "one of the role tool")
    return output


def _row_weight(value: Any, faults: LineFaults) -> float:
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= ROW_WEIGHT_MAX:
        faults.add("$.weight", f"a number from 0 to {ROW_WEIGHT_MAX}", describe(value))
        return 1.0
    return float(value)
