"""The rows of a dataset as types, which features they use, and how large they may be."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    # Only the type of two fields: who reads no token ids does not load numpy.
    import numpy as np
    from numpy.typing import NDArray

Format = Literal["conversation", "instruction", "text", "preference", "tokens", "feedback"]

# The first bytes of a Parquet file; every other file is JSONL.
PARQUET_MAGIC = b"PAR1"
ROWS_MAX = 10_000_000
ROW_TOKENS_MAX = 16_777_216
MESSAGES_MAX = 1000
TOOLS_MAX = 128
TOOL_CALLS_MAX = 128
# A row's weight multiplies its loss; more than this is a mistake of scale, not a preference.
ROW_WEIGHT_MAX = 100
# The label of a token without loss, as transformers has it.
UNLABELLED = -100


@dataclass(kw_only=True, slots=True)
class Features:
    """What any sound row of a file makes use of; a weight counts when it is not 1."""

    tools: bool = False
    reasoning: bool = False
    message_weights: bool = False
    sample_weights: bool = False
    parallel_tool_calls: bool = False
    thumbs_up: bool = False
    thumbs_down: bool = False

    def add_all(self, others: "Features") -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) or getattr(others, name))

    def used(self) -> tuple[str, ...]:
        """Names, in alphabetical order."""
        return tuple(sorted(feature.name for feature in fields(self) if getattr(self, feature.name)))


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolCall:
    """`arguments` is a JSON object, also where the file spelled it as a string: so servers hand it to the template."""

    name: str
    arguments: dict[str, Any]
    id: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """`role` is system, user, assistant or tool; `reasoning` and `tool_calls` only with assistant, `tool_call_id` only
    with tool."""

    role: str
    content: str
    weight: int = 1
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """`tools` are the JSON objects that declare functions, passed to the template as they are.

    One answer of several, or one that is judged, says under which key its `answer` stands, and that `asked` messages of
    the `question`, a path in the line, come before it.
    """

    line: int
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    weight: float = 1.0
    answer: str = ""
    asked: int = 0
    question: str = "messages"


@dataclass(frozen=True, kw_only=True, slots=True)
class Instruction:
    """A prompt and its completion, without a template."""

    line: int
    prompt: str
    completion: str
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """Text that is learned whole."""

    line: int
    text: str
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Preference:
    """One question and two ways to go on, each of them messages of the assistant and of tools.

    The line reads `{"input": {"messages", "tools"?}, "preferred_output": [...], "non_preferred_output": [...]}`.
    """

    line: int
    messages: tuple[Message, ...]
    preferred_output: tuple[Message, ...]
    non_preferred_output: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Feedback:
    """One answer and whether it was found good: thumbs up, or thumbs down.

    The line reads `{"prompt": ..., "completion": ..., "label": true}`, where prompt and completion are both messages or
    both text. `example` is the answer as a row of its own, in which nothing else is learned.
    """

    example: Conversation | Instruction
    label: bool

    @property
    def line(self) -> int:
        return self.example.line

    @property
    def weight(self) -> float:
        return self.example.weight


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tokens:
    """A row that came as token ids, without padding. `labelled` is None when the file says nothing about labels."""

    line: int
    ids: "NDArray[np.int32]"
    labelled: "NDArray[np.bool_] | None"
    weight: float = 1.0


Row = Conversation | Instruction | Text | Preference | Feedback | Tokens
