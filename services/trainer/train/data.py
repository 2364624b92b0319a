"""Reads a JSONL dataset line by line into typed rows and reports every broken line. It knows no tokenizer and no template."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Format = Literal["conversation", "instruction"]

LINE_BYTES_MAX = 16 * 1024 * 1024
ROWS_MAX = 10_000_000
MESSAGES_MAX = 1000
ERRORS_MAX = 100
ROLES = ("system", "user", "assistant")
# Keys that other formats give a meaning: to ignore them would train something else than what the row says.
_UNSUPPORTED_ROW_KEYS = (
    "tools", "functions", "input", "preferred_output", "non_preferred_output", "input_ids", "labels", "weight",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class RowError:
    line: int
    path: str
    expected: str


@dataclass(kw_only=True)
class RowErrors:
    """Keeps the first `kept_max` errors and counts all."""

    kept_max: int = ERRORS_MAX
    kept: list[RowError] = field(default_factory=list)
    count: int = 0

    def add(self, line: int, path: str, expected: str) -> None:
        self.count += 1
        if len(self.kept) < self.kept_max:
            self.kept.append(RowError(line=line, path=path, expected=expected))


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    role: str
    content: str
    weight: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    line: int
    messages: tuple[Message, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Instruction:
    line: int
    prompt: str
    completion: str


Row = Conversation | Instruction


class RowReader:
    """Iterates over the sound rows of a file. `errors`, `format` and `sha256` are complete once the iteration is."""

    def __init__(self, path: Path, errors_max: int = ERRORS_MAX) -> None:
        self.errors = RowErrors(kept_max=errors_max)
        self.format: Format | None = None
        self.sha256 = ""
        self._path = path

    def __iter__(self) -> Iterator[Row]:
        digest = hashlib.sha256()
        lines = 0
        with self._path.open("rb") as stream:
            while line := stream.readline(LINE_BYTES_MAX + 1):
                digest.update(line)
                lines += 1
                if len(line) > LINE_BYTES_MAX:
                    self.errors.add(lines, "$", f"a line of at most {LINE_BYTES_MAX} bytes")
                    break
                if lines > ROWS_MAX:
                    self.errors.add(lines, "$", f"at most {ROWS_MAX} lines")
                    break
                row = self._row(lines, line)
                if row is not None:
                    yield row
        self.sha256 = digest.hexdigest()
        if self.format is None and not self.errors.count:
            self.errors.add(1, "$", "at least one row; the file is empty")

    def _row(self, number: int, line: bytes) -> Row | None:
        if not line.strip():
            return None
        errors_before = self.errors.count

        def refuse(path: str, expected: str) -> None:
            self.errors.add(number, path, expected)

        document = _parse(line, first=number == 1, refuse=refuse)
        if document is None:
            return None
        read = _instruction if _is_instruction(document) else _conversation
        row: Row | None = read(number, document, refuse)
        if row is None or self.errors.count > errors_before:
            return None
        kind: Format = "instruction" if isinstance(row, Instruction) else "conversation"
        if self.format not in (None, kind):
            refuse("$", f"a row of the {self.format} format like the rows before it")
            return None
        self.format = kind
        return row


Refuse = Callable[[str, str], None]


def _parse(line: bytes, *, first: bool, refuse: Refuse) -> dict[str, Any] | None:
    try:
        text = line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        refuse("$", f"UTF-8 text; byte {error.start} of the line is not")
        return None
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        refuse("$", f"a JSON object: {error}")
        return None
    if not isinstance(document, dict):
        refuse("$", "a JSON object")
        return None
    for key in _UNSUPPORTED_ROW_KEYS:
        if key in document:
            refuse(f"$.{key}", "no such key: this format is not supported")
    return document


def _is_instruction(document: dict[str, Any]) -> bool:
    return "messages" not in document and ("prompt" in document or "completion" in document)


def _instruction(line: int, document: dict[str, Any], refuse: Refuse) -> Instruction | None:
    texts = {}
    for key in ("prompt", "completion"):
        texts[key] = _text(document.get(key), f"$.{key}", refuse)
    prompt, completion = texts["prompt"], texts["completion"]
    if completion == "":
        refuse("$.completion", "a string that is not empty")
    if prompt is None or completion is None:
        return None
    return Instruction(line=line, prompt=prompt, completion=completion)


def _conversation(line: int, document: dict[str, Any], refuse: Refuse) -> Conversation | None:
    messages = document.get("messages")
    if not isinstance(messages, list) or not messages:
        refuse("$.messages", "a list of messages (or the keys prompt and completion)")
        return None
    if len(messages) > MESSAGES_MAX:
        refuse("$.messages", f"at most {MESSAGES_MAX} messages")
        return None
    parsed = [_message(index, message, refuse) for index, message in enumerate(messages)]
    if not any(isinstance(message, dict) and message.get("role") == "assistant" for message in messages):
        refuse("$.messages", "at least one message of the role assistant")
        return None
    return Conversation(line=line, messages=tuple(message for message in parsed if message is not None))


def _message(index: int, value: Any, refuse: Refuse) -> Message | None:
    path = f"$.messages[{index}]"
    if not isinstance(value, dict):
        refuse(path, "an object with role and content")
        return None
    for key in sorted(set(value) - {"role", "content", "weight"}):
        refuse(f"{path}.{key[:60]}", "no such key: a message has role, content and weight")
    role = value.get("role")
    if role not in ROLES:
        refuse(f"{path}.role", f"one of {', '.join(ROLES)}")
    elif role == "system" and index > 0:
        refuse(f"{path}.role", "a system message only as the first one")
    content = _text(value.get("content"), f"{path}.content", refuse)
    weight = value.get("weight", 1)
    if weight is None:
        weight = 1
    if isinstance(weight, bool) or weight not in (0, 1):
        refuse(f"{path}.weight", "0 or 1")
        return None
    if role not in ROLES or content is None:
        return None
    return Message(role=role, content=content, weight=int(weight))


def _text(value: Any, path: str, refuse: Refuse) -> str | None:
    if not isinstance(value, str):
        refuse(path, "a string")
        return None
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        # JSON can spell half of a surrogate pair; no tokenizer can read it.
        refuse(path, "text without unpaired surrogates")
        return None
    return value
