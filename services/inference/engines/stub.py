"""A deterministic engine for tests of everything around one: an answer is a hash of prompt, adapter and seed.

It keeps the whole contract of base.py (limits, locks, cancellation, failures) and refuses to know any model.
"""

from __future__ import annotations

import asyncio
import json
import re
import zlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from formats.prompts.plain_messages import plain
from formats.rows import Message
from services.inference.engines.adapters.adapter_table import Adapter
from services.inference.engines.answer_chunks import Chunk, Usage
from services.inference.engines.answer_form import AnswerForm, ResponseKind
from services.inference.engines.base import EngineFailed, EngineSettings, GenerateRequest, RequestInvalid
from services.inference.engines.in_process import ENDED, InProcessEngine
from services.inference.engines.stub_answer import StubAnswer, answer_tokens

_PIECE = re.compile(r"\w+|[^\w\s]")
_ROLES = {"system": 1, "user": 2, "assistant": 3, "tool": 7}
_TURN_END = 4
_TEXT_START = 5
_INPUT_FIRST = 10_000
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

    async def render_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        enable_thinking: bool | None = None,
    ) -> tuple[int, ...]:
        ids: list[int] = [_TEXT_START]
        if tools or enable_thinking is not None:
            ids += _tokens(json.dumps([list(tools), enable_thinking], sort_keys=True))
        for message in messages:
            if message.role not in _ROLES:
                raise RequestInvalid("messages", f"unknown role {message.role[:32]!r}")
            told = {key: value for key, value in plain(message).items() if key not in ("role", "content")}
            ids += [_ROLES[message.role], *_tokens(message.content)]
            ids += [*(_tokens(json.dumps(told, sort_keys=True)) if told else ()), _TURN_END]
        return (*ids, _ROLES["assistant"])

    async def render_text(self, text: str) -> tuple[int, ...]:
        return (_TEXT_START, *_tokens(text))

    async def count_tokens(self, text: str) -> int:
        return len(_tokens(text))

    async def check_form(self, form: AnswerForm) -> None:
        if form.response is ResponseKind.JSON_SCHEMA:
            raise RequestInvalid("response_format", "the stub engine keeps no schema")

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        await self.health()
        async with self._admitted(request) as (tokens_max, adapter), self._slots:
            answers = _answers(request, adapter.number if adapter else 0, tokens_max)
            while unfinished := [answer for answer in answers if not answer.finished]:
                await asyncio.sleep(self._token_s)
                await self.health()
                chunks = [chunk for answer in unfinished if (chunk := answer.step()) is not None]
                usage = Usage(
                    prompt_tokens=len(request.prompt_token_ids),
                    completion_tokens=sum(answer.count for answer in answers),
                )
                done = all(answer.finished for answer in answers)
                for at, chunk in enumerate(chunks, 1):
                    yield replace(chunk, usage=usage, is_last=done and at == len(chunks))

    async def _load(self, adapter: Adapter) -> None:
        """There is no memory to load an adapter into."""

    async def _unload(self, adapter: Adapter) -> None:
        """There is no memory to take an adapter out of."""


def _tokens(text: str) -> list[int]:
    return [_INPUT_FIRST + zlib.crc32(piece.encode()) % 50_000 for piece in _PIECE.findall(text)]


def _answers(request: GenerateRequest, adapter_number: int, tokens_max: int) -> list[StubAnswer]:
    # A greedy request has one answer whatever its seed says.
    seed = request.sampling.seed if request.sampling.temperature > 0 else None
    return [
        StubAnswer(
            request=request,
            choice=choice,
            tokens=answer_tokens(
                f"{adapter_number}/{seed}/{list(request.prompt_token_ids)}{choice or ''}", request.sampling
            ),
            tokens_max=tokens_max,
        )
        for choice in range(request.sampling.choices)
    ]
