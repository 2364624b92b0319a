"""Checks a JSONL dataset from chunks of bytes and reports every error with its line, JSON path and expectation.

Pure and bounded: it holds one line at a time and never the file. It knows no tokenizer, no store and no protobuf.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

Format = Literal["conversation", "instruction"]

ROLES = ("system", "user", "assistant")
# Keys that other dataset formats give a meaning: to ignore them would train something else than what the line says.
UNSUPPORTED_KEYS = (
    "tools", "functions", "input", "preferred_output", "non_preferred_output", "input_ids", "labels", "weight",
)  # fmt: skip
MESSAGE_KEYS = frozenset({"role", "content", "weight"})

_FOUND_CHARS_MAX = 80
_KEY_CHARS_MAX = 60
_BOM = b"\xef\xbb\xbf"
_WHOLE = "$"


@dataclass(frozen=True, kw_only=True)
class DatasetLimits:
    """What one file may hold; errors past `errors_max` are counted but not kept."""

    line_bytes_max: int
    lines_max: int
    messages_max: int
    errors_max: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetError:
    """`line` counts from 1; 0 is the file as a whole."""

    line: int
    path: str
    expectation: str
    found: str


@dataclass(frozen=True, kw_only=True)
class DatasetReport:
    format: Format | None
    # Non-blank lines, which are the examples.
    line_count: int
    errors: tuple[DatasetError, ...]
    error_count: int


class DatasetCheck:
    """`feed` the chunks in order, then `finish` once."""

    def __init__(self, limits: DatasetLimits) -> None:
        self._limits = limits
        self._errors = _Errors(kept_max=limits.errors_max)
        self._partial = bytearray()
        self._skipping = False
        self._line = 0
        self._examples = 0
        # The format of the first sound line; of the first recognised one as long as none is sound.
        self._format: Format | None = None
        self._seen: Format | None = None

    def feed(self, chunk: bytes) -> None:
        start = 0
        while (end := chunk.find(b"\n", start)) >= 0:
            if self._skipping:
                self._skipping = False
            elif self._partial:
                self._add(chunk[start:end])
                self._end_partial()
            else:
                self._check(chunk[start:end])
            start = end + 1
        if start < len(chunk) and not self._skipping:
            self._add(chunk[start:])

    def finish(self) -> DatasetReport:
        if self._partial:
            self._end_partial()
        if not self._examples:
            self._errors.add(0, _WHOLE, "at least one example, one JSON object on a line", "an empty file")
        return DatasetReport(
            format=self._format or self._seen,
            line_count=self._examples,
            errors=tuple(self._errors.kept),
            error_count=self._errors.count,
        )

    def _add(self, piece: bytes) -> None:
        self._partial += piece
        if len(self._partial) > self._limits.line_bytes_max:
            self._check(bytes(self._partial[: self._limits.line_bytes_max + 1]))
            self._partial.clear()
            self._skipping = True

    def _end_partial(self) -> None:
        if self._skipping:
            # The piece that ended the line also took it over the limit: it is checked and reported already.
            self._skipping = False
            return
        line = bytes(self._partial)
        self._partial.clear()
        self._check(line)

    def _check(self, line: bytes) -> None:
        self._line += 1
        if not line.strip():
            return
        self._examples += 1
        if self._examples > self._limits.lines_max:
            if self._examples == self._limits.lines_max + 1:
                self._errors.add(self._line, _WHOLE, f"at most {self._limits.lines_max} examples in a file", "one more")
            return
        errors_before = self._errors.count
        document = self._parse(line)
        if document is None:
            return
        shape = _check_document(document, self._limits.messages_max, self._refuse)
        if shape is None:
            return
        self._seen = self._seen or shape
        expected = self._format or self._seen
        if shape != expected:
            self._refuse(_WHOLE, f"an example of the {expected} format, like the lines before it", f"{shape} format")
        elif self._format is None and self._errors.count == errors_before:
            self._format = shape

    def _parse(self, line: bytes) -> dict[str, Any] | None:
        if len(line) > self._limits.line_bytes_max:
            limit = self._limits.line_bytes_max
            self._refuse(_WHOLE, f"a line of at most {limit} bytes", f"more than {limit} bytes")
            return None
        if line.startswith(_BOM) and self._line == 1:
            self._refuse(_WHOLE, "UTF-8 without a byte order mark", "a byte order mark")
            line = line[len(_BOM) :]
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            found = f"byte 0x{line[error.start]:02x} at offset {error.start} of the line"
            self._refuse(_WHOLE, "UTF-8 text", found)
            return None
        try:
            document = _DECODER.decode(text)
        except json.JSONDecodeError as error:
            self._refuse(_WHOLE, "a JSON object", f"{error.msg} at character {error.pos + 1}")
            return None
        except RecursionError:
            self._refuse(_WHOLE, "a JSON object", "brackets nested too deeply")
            return None
        except ValueError as error:
            self._refuse(_WHOLE, "a JSON object", str(error)[:_FOUND_CHARS_MAX])
            return None
        if not isinstance(document, dict):
            self._refuse(_WHOLE, "a JSON object", describe(document))
            return None
        return document

    def _refuse(self, path: str, expectation: str, found: str) -> None:
        self._errors.add(self._line, path, expectation, found)


@dataclass(kw_only=True)
class _Errors:
    """Keeps the first ones and counts all."""

    kept_max: int
    kept: list[DatasetError] = field(default_factory=list)
    count: int = 0

    def add(self, line: int, path: str, expectation: str, found: str) -> None:
        self.count += 1
        if len(self.kept) < self.kept_max:
            self.kept.append(DatasetError(line=line, path=path, expectation=expectation, found=found))


Refuse = Callable[[str, str, str], None]


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name}, which is no JSON")


# Python's decoder takes NaN and Infinity unless told otherwise.
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _check_document(document: dict[str, Any], messages_max: int, refuse: Refuse) -> Format | None:
    """The recognised format, also of a line with errors; None when the line has neither shape."""
    for key in UNSUPPORTED_KEYS:
        if key in document:
            refuse(f"$.{key}", "no such key: this kind of example is not supported", describe(document[key]))
    if "messages" in document:
        _check_messages(document["messages"], messages_max, refuse)
        return "conversation"
    if "prompt" in document or "completion" in document:
        for key in ("prompt", "completion"):
            if key in document:
                _check_text(document[key], f"$.{key}", refuse, may_be_empty=key == "prompt")
            else:
                refuse(f"$.{key}", "a string", "nothing")
        return "instruction"
    refuse(_WHOLE, "the key `messages`, or the keys `prompt` and `completion`", describe(document))
    return None


def _check_messages(messages: Any, messages_max: int, refuse: Refuse) -> None:
    if not isinstance(messages, list) or not messages:
        refuse("$.messages", "a list of at least one message", describe(messages))
        return
    if len(messages) > messages_max:
        refuse("$.messages", f"at most {messages_max} messages", f"{len(messages)} messages")
        return
    for index, message in enumerate(messages):
        _check_message(index, message, refuse)
    if not any(isinstance(message, dict) and message.get("role") == "assistant" for message in messages):
        refuse("$.messages", "at least one message of the role assistant", "none")


def _check_message(index: int, message: Any, refuse: Refuse) -> None:
    path = f"$.messages[{index}]"
    if not isinstance(message, dict):
        refuse(path, "an object with role and content", describe(message))
        return
    for key in sorted(message.keys() - MESSAGE_KEYS):
        refuse(
            f"{path}.{_printable(key)[:_KEY_CHARS_MAX]}", "no such key: a message has role, content, weight", "a key"
        )
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        refuse(f"{path}.role", f"one of {', '.join(ROLES)}", describe(role) if "role" in message else "nothing")
    elif role == "system" and index > 0:
        refuse(f"{path}.role", "a system message only as the first one", f"one at position {index + 1}")
    if "content" in message:
        _check_text(message["content"], f"{path}.content", refuse, may_be_empty=True)
    else:
        refuse(f"{path}.content", "a string", "nothing")
    weight = message.get("weight")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        refuse(f"{path}.weight", "0 or 1", describe(weight))


def _check_text(value: Any, path: str, refuse: Refuse, *, may_be_empty: bool) -> None:
    if not isinstance(value, str):
        refuse(path, "a string", describe(value))
    elif not value and not may_be_empty:
        refuse(path, "a string that is not empty", "an empty string")
    elif not value.isascii() and _has_lone_surrogate(value):
        # JSON can spell half of a surrogate pair; no tokenizer can read it.
        refuse(path, "text without unpaired surrogates", describe(value))


def _has_lone_surrogate(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


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
