"""What an engine says while it generates: text, reasoning, calls of tools, tokens and their probabilities.

It refuses to know how tokens are computed, and how calls are found among them.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class FinishReason(enum.StrEnum):
    """Why an answer ended: a stop token or string, the token limit, or calls of tools that have to be answered."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """A token with its log probability; `alternatives` holds the most likely tokens at that position, best first."""

    token_id: int
    text: str
    logprob: float
    alternatives: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ToolCallDelta:
    """New text of one call of a tool; `id` and `name` stand in its first part, the `arguments` together are JSON."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens of a request so far, those of all its choices; the end-of-sequence token counts as a completion token."""

    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_cached: int = 0


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A batch of new tokens of one choice. `usage` is cumulative, so a stream that is cut can still be metered."""

    text: str
    token_ids: tuple[int, ...]
    usage: Usage
    choice: int = 0
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None  # set in the last chunk of its choice only
    is_last: bool = False  # of all choices
