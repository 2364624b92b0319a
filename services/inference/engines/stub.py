"""A deterministic engine for tests of everything around one: an answer is a hash of prompt, adapter and seed.

It keeps the whole contract of base.py (limits, locks, cancellation, failures) and refuses to know any model.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import zlib
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from services.inference.engines.adapters.adapter_table import Adapter
from services.inference.engines.base import (
    Chunk,
    EngineFailed,
    EngineSettings,
    FinishReason,
    GenerateRequest,
    Message,
    RequestInvalid,
    TokenLogprob,
    Usage,
)
from services.inference.engines.in_process import ENDED, InProcessEngine

_PIECE = re.compile(r"\w+|[^\w\s]")
_ROLES = {"system": 1, "user": 2, "assistant": 3}
_TURN_END = 4
_TEXT_START = 5
_END = 6
_WORD_FIRST = 1000
_VOCABULARY = (
    "mesh anvil harbor lantern copper meadow signal velvet orbit cedar thunder maple "
    "quartz river ember falcon granite willow beacon saddle prairie cobalt tundra marble"
)
_WORDS = _VOCABULARY.split()
_INPUT_FIRST = 10_000
_ANSWER_TOKENS_MIN = 8
_DEADLINE_POLL_S = 0.1


class StubEngine(InProcessEngine):
    """Answers at once with eight or more words. `token_s` slows it down and `fail` kills it, for tests."""

    def __init__(self, model_path: Path, settings: EngineSettings, *, token_s: float = 0.0) -> None:
        super().__init__(model_path, settings)
        self._token_s = token_s
        self._state = "new"
        self._problem = EngineFailed("the engine is not running")
        self._failed = asyncio.Event()
        self._slots = asyncio.Semaphore(settings.sequences_max)

    async def start(self) -> None:
        await self._read_model()
        self._state = "running"

    async def stop(self) -> None:
        self._state = "stopped"
        self._problem = EngineFailed("the engine was stopped")

    def fail(self, problem: str) -> None:
        """Die as an engine dies whose process is gone."""
        self._state = "failed"
        self._problem = EngineFailed(problem)
        self._failed.set()

    async def health(self) -> None:
        self._check_deadline()
        if self._state != "running":
            raise self._problem

    async def wait_failed(self) -> EngineFailed:
        while not self._failed.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._failed.wait(), _DEADLINE_POLL_S)
            if self._deadline.passed and self._state == "running":
                self.fail(ENDED)
        return self._problem

    async def render_chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        ids: list[int] = [_TEXT_START]
        for message in messages:
            if message.role not in _ROLES:
                raise RequestInvalid("messages", f"unknown role {message.role[:32]!r}")
            ids += [_ROLES[message.role], *_tokens(message.content), _TURN_END]
        return (*ids, _ROLES["assistant"])

    async def render_text(self, text: str) -> tuple[int, ...]:
        return (_TEXT_START, *_tokens(text))

    async def count_tokens(self, text: str) -> int:
        return len(_tokens(text))

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        await self.health()
        async with self._admitted(request) as (tokens_max, adapter), self._slots:
            answer = _Answer(request, _answer_tokens(request, adapter.number if adapter else 0), tokens_max)
            while not answer.finished:
                await asyncio.sleep(self._token_s)
                await self.health()
                if (chunk := answer.step()) is not None:
                    yield chunk

    async def _load(self, adapter: Adapter) -> None:
        """There is no memory to load an adapter into."""

    async def _unload(self, adapter: Adapter) -> None:
        """There is no memory to take an adapter out of."""


def _tokens(text: str) -> list[int]:
    return [_INPUT_FIRST + zlib.crc32(piece.encode()) % 50_000 for piece in _PIECE.findall(text)]


def _answer_tokens(request: GenerateRequest, adapter_number: int) -> Iterator[int]:
    # A greedy request has one answer whatever its seed says.
    seed = request.sampling.seed if request.sampling.temperature > 0 else None
    key = f"{adapter_number}/{seed}/{list(request.prompt_token_ids)}".encode()
    digest = hashlib.sha256(key).digest()
    for byte in digest[: _ANSWER_TOKENS_MIN + digest[0] % 16]:
        yield _WORD_FIRST + byte % len(_WORDS)
    yield _END


@dataclass
class _Answer:
    """One answer being spelled out: holds back text that may turn into a stop string."""

    request: GenerateRequest
    tokens: Iterator[int]
    tokens_max: int
    finished: bool = False
    text: str = ""
    sent_chars: int = 0
    count: int = 0
    pending: list[int] = field(default_factory=list)

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
        if starts:
            self.text = self.text[: min(starts)]
            return FinishReason.STOP
        return FinishReason.LENGTH if self.count >= self.tokens_max else None

    def _chunk(self, until: int, reason: FinishReason | None) -> Chunk:
        delta, token_ids = self.text[self.sent_chars : until], tuple(self.pending)
        self.sent_chars = until
        self.pending.clear()
        return Chunk(
            text=delta,
            token_ids=token_ids,
            usage=Usage(prompt_tokens=len(self.request.prompt_token_ids), completion_tokens=self.count),
            logprobs=tuple(_logprob(token, self.request.sampling.logprobs) for token in token_ids)
            if self.request.sampling.logprobs is not None
            else (),
            finish_reason=reason,
        )


def _logprob(token: int, alternatives: int | None) -> TokenLogprob:
    chosen = TokenLogprob(token_id=token, text=_text(token), logprob=-0.125)
    others = (TokenLogprob(token_id=one, text=_text(one), logprob=-2.0 - one / 1000) for one in _others(token))
    ranked = tuple(one for one, _ in zip((chosen, *others), range(alternatives or 0), strict=False))
    return TokenLogprob(token_id=token, text=chosen.text, logprob=chosen.logprob, alternatives=ranked)


def _others(token: int) -> list[int]:
    return [one for one in range(_WORD_FIRST, _WORD_FIRST + len(_WORDS)) if one != token]


def _text(token: int) -> str:
    return "" if token == _END else _WORDS[token - _WORD_FIRST]
