"""What the stub says: words by a hash, in the form that was asked for. Pure.

A tool that must be called is called, a JSON object is one, and what thinks says so; no schema is honoured, and none is
claimed to be.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle

from services.inference.engines.answer_chunks import Chunk, FinishReason, TokenLogprob, ToolCallDelta, Usage
from services.inference.engines.answer_form import AnswerForm, ResponseKind
from services.inference.engines.base import GenerateRequest, Sampling

_END = 6
_WORD_FIRST = 1000
_VOCABULARY = (
    "mesh anvil harbor lantern copper meadow signal velvet orbit cedar thunder maple "
    "quartz river ember falcon granite willow beacon saddle prairie cobalt tundra marble"
)
_WORDS = _VOCABULARY.split()
_ANSWER_TOKENS_MIN = 8
_THOUGHTS = 3  # words of an answer that thinks, before its text
_OBJECT_BEGINS, _OBJECT_ENDS = '{"text": "', '"}'


def answer_tokens(key: str, sampling: Sampling) -> Iterator[int]:
    """Words, and the token that ends them unless it is to be ignored."""
    digest = hashlib.sha256(key.encode()).digest()
    count = max(_ANSWER_TOKENS_MIN + digest[0] % 16, sampling.completion_tokens_min)
    for at, byte in enumerate(cycle(digest)):
        if at == count and not sampling.ignore_eos:
            break
        yield _WORD_FIRST + byte % len(_WORDS)
    yield _END


@dataclass(kw_only=True)
class StubAnswer:
    """One answer being spelled out: holds back text that may turn into a stop string."""

    request: GenerateRequest
    choice: int
    tokens: Iterator[int]
    tokens_max: int
    finished: bool = False
    text: str = ""
    sent_chars: int = 0
    count: int = 0
    pending: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._form = self.request.form or AnswerForm()
        self._is_object = self._form.must_call or self._form.response is ResponseKind.JSON_OBJECT
        self._begun = False

    def step(self) -> Chunk | None:
        """Take one token; the chunk to send, or None while everything is held back."""
        token = next(self.tokens)
        self.count += 1
        self.pending.append(token)
        reason = None
        if token == _END:
            reason = FinishReason.STOP
        else:
            self.text += (" " if self.count > 1 else "") + _WORDS[token - _WORD_FIRST]
            reason = self._reason()
        self.finished = reason is not None
        held = 0 if self.finished else max((len(stop) - 1 for stop in self.request.sampling.stop), default=0)
        until = max(self.sent_chars, len(self.text) - held)
        if not self.finished and until == self.sent_chars:
            return None
        return self._chunk(until, reason)

    def _reason(self) -> FinishReason | None:
        starts = [at for stop in self.request.sampling.stop if (at := self.text.find(stop)) >= 0]
        if starts and self.count >= self.request.sampling.completion_tokens_min:
            self.text = self.text[: min(starts)]
            return FinishReason.STOP
        return FinishReason.LENGTH if self.count >= self.tokens_max else None

    def _chunk(self, until: int, reason: FinishReason | None) -> Chunk:
        delta, token_ids = self.text[self.sent_chars : until], tuple(self.pending)
        self.sent_chars = until
        self.pending.clear()
        thinks = bool(self._form.enable_thinking) and self.count <= _THOUGHTS
        said = "" if thinks else self._dressed(delta, reason)
        call = self._call(said) if said and self._form.must_call else ()
        self._begun |= bool(said)
        if call and reason is FinishReason.STOP:
            reason = FinishReason.TOOL_CALLS
        return Chunk(
            text="" if call else said,
            reasoning=delta if thinks else "",
            tool_calls=call,
            token_ids=token_ids,
            usage=Usage(prompt_tokens=len(self.request.prompt_token_ids), completion_tokens=self.count),
            choice=self.choice,
            logprobs=tuple(_logprob(token, self.request.sampling.logprobs) for token in token_ids)
            if self.request.sampling.logprobs is not None
            else (),
            finish_reason=reason,
        )

    def _dressed(self, delta: str, reason: FinishReason | None) -> str:
        """As the string of an object where one is asked for. An answer that is cut leaves it open."""
        if not self._is_object:
            return delta
        begins = "" if self._begun else _OBJECT_BEGINS
        return begins + delta + (_OBJECT_ENDS if reason is FinishReason.STOP else "")

    def _call(self, arguments: str) -> tuple[ToolCallDelta, ...]:
        if self._begun:
            return (ToolCallDelta(index=0, arguments=arguments),)
        tools = [tool["function"]["name"] for tool in self._form.tools]
        call_id = f"call_{self.request.request_id}_{self.choice}"
        return (ToolCallDelta(index=0, id=call_id, name=self._form.function or tools[0], arguments=arguments),)


def _logprob(token: int, alternatives: int | None) -> TokenLogprob:
    chosen = TokenLogprob(token_id=token, text=_text(token), logprob=-0.125)
    others = (TokenLogprob(token_id=one, text=_text(one), logprob=-2.0 - one / 1000) for one in _others(token))
    ranked = tuple(one for one, _ in zip((chosen, *others), range(alternatives or 0), strict=False))
    return TokenLogprob(token_id=token, text=chosen.text, logprob=chosen.logprob, alternatives=ranked)


def _others(token: int) -> list[int]:
    return [one for one in range(_WORD_FIRST, _WORD_FIRST + len(_WORDS)) if one != token]


def _text(token: int) -> str:
    return "" if token == _END else _WORDS[token - _WORD_FIRST]
