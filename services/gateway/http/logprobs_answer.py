"""Writes log probabilities in the three forms that clients know. Not pure: protobuf."""

from collections.abc import Sequence
from enum import Enum
from typing import Any

from finemesh.inference.v1.generation_pb2 import TokenLogprob

# JSON has no infinity; OpenAI's and vLLM's servers write so of what cannot be.
_IMPOSSIBLE = -9999.0
_PART_OF_A_CHARACTER = "\N{REPLACEMENT CHARACTER}"


class LogprobsForm(Enum):
    """Whose form a chat's log probabilities have."""

    NONE = "none"
    OPENAI = "openai"
    TOGETHER = "together"


def chat_logprobs(tokens: Sequence[TokenLogprob], form: LogprobsForm) -> dict[str, Any] | None:
    match form:
        case LogprobsForm.OPENAI:
            content = [
                {**_token(token), "top_logprobs": [_token(each) for each in token.alternatives]} for token in tokens
            ]
            return {"content": content, "refusal": None}
        case LogprobsForm.TOGETHER:
            return {
                "tokens": [token.text for token in tokens],
                "token_logprobs": [_finite(token) for token in tokens],
                "token_ids": [token.token_id for token in tokens],
                "top_logprobs": [_by_text(token) for token in tokens],
            }
        case _:
            return None


def completion_logprobs(tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    """The older form; `offset` is where the first token begins, in characters of the answer."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "text_offset": offsets,
        "token_logprobs": [_finite(token) for token in tokens],
        "tokens": [token.text for token in tokens],
        "top_logprobs": [_by_text(token) for token in tokens],
    }


def _token(token: TokenLogprob) -> dict[str, Any]:
    # The bytes of a part of a character are not known.
    spelled = None if _PART_OF_A_CHARACTER in token.text else list(token.text.encode())
    return {"token": token.text, "logprob": _finite(token), "bytes": spelled}


def _by_text(token: TokenLogprob) -> dict[str, float]:
    """The alternatives and the token itself; of two with one text the likelier."""
    found: dict[str, float] = {}
    for each in (*token.alternatives, token):
        found[each.text] = max(_finite(each), found.get(each.text, _IMPOSSIBLE))
    return found


def _finite(token: TokenLogprob) -> float:
    return max(token.logprob, _IMPOSSIBLE)
