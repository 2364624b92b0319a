"""Rows of other formats in wide use: what each is called, and which keys it has here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ForeignRow:
    """`name` is what people call such rows; `cure` says what to write instead."""

    name: str
    cure: str


_SHAREGPT = ForeignRow(
    name="ShareGPT (`conversations` with `from` and `value`)",
    cure=(
        "rename `conversations` to `messages`, `from` to `role` and `value` to `content`, and the roles human to user "
        "and gpt to assistant"
    ),
)
_CONVERSATIONS = ForeignRow(name="a row with the key `conversations`", cure="rename `conversations` to `messages`")
_ALPACA = ForeignRow(
    name="Alpaca (`instruction`, `input`, `output`)",
    cure=(
        '{"messages": [{"role": "user", "content": INSTRUCTION + "\\n\\n" + INPUT}, {"role": "assistant", "content": '
        'OUTPUT}]}, or {"prompt": ..., "completion": ...} to train without a chat template'
    ),
)
_CHOSEN = ForeignRow(
    name="pairs of `chosen` and `rejected`",
    cure=(
        '{"input": {"messages": PROMPT}, "preferred_output": CHOSEN, "non_preferred_output": REJECTED}, each a list of '
        "messages; a prompt that CHOSEN and REJECTED begin with belongs to PROMPT alone"
    ),
)
_PROMPTED = ForeignRow(
    name="a prompt and a completion of messages",
    cure=(
        '{"messages": PROMPT + COMPLETION}, with "weight": 0 on earlier answers that are not to be learned; feedback '
        "has a `label` beside them"
    ),
)
_CONTENTS = ForeignRow(
    name="Gemini (`contents` with `parts`)",
    cure='{"messages": [{"role": "user", "content": TEXT}, {"role": "assistant", "content": TEXT}]}',
)
_BATCH = ForeignRow(name="requests of a batch", cure='a row is the conversation with its answer: {"messages": [...]}')


def _asked(question: str, answer: str) -> ForeignRow:
    return ForeignRow(
        name=f"`{question}` with `{answer}`",
        cure=(
            f'{{"messages": [{{"role": "user", "content": {question.upper()}}}, {{"role": "assistant", "content": '
            f"{answer.upper()}}}]}}"
        ),
    )


def _has(*keys: str) -> Callable[[dict[str, Any]], bool]:
    return lambda row: all(key in row for key in keys)


def _speaks_from(row: dict[str, Any]) -> bool:
    turns = row.get("conversations")
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and "from" in turns[0]


def _prompts_with_messages(row: dict[str, Any]) -> bool:
    return isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list) and "label" not in row


_PAIRS = (
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("instruction", "response"),
    ("instruction", "completion"),
    ("prompt", "response"),
    ("prompt", "answer"),
    ("input", "output"),
)
# The first that fits is told.
_KNOWN: tuple[tuple[Callable[[dict[str, Any]], bool], ForeignRow], ...] = (
    (_speaks_from, _SHAREGPT),
    (_has("conversations"), _CONVERSATIONS),
    (_has("chosen", "rejected"), _CHOSEN),
    (_has("instruction", "output"), _ALPACA),
    (_prompts_with_messages, _PROMPTED),
    (_has("contents"), _CONTENTS),
    (_has("custom_id", "body"), _BATCH),
    *((_has(question, answer), _asked(question, answer)) for question, answer in _PAIRS),
)


def foreign_row(row: dict[str, Any]) -> ForeignRow | None:
    """None for keys that no format in use has."""
    return next((known for fits, known in _KNOWN if fits(row)), None)
