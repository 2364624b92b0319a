"""Asks the process that reads answers, part by part. Not pure: processes.

What it cannot say of an answer becomes plain text, so that nothing is lost but its order. It refuses to know engines.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import structlog

from services.inference.engines.answer_chunks import Chunk, FinishReason, ToolCallDelta
from services.inference.engines.answer_form import AnswerForm, AnswerParsers, ResponseKind
from services.inference.engines.answers.answer_questions import keeps_thoughts, packed_form
from services.inference.engines.base import EngineError, EngineFailed, PromptFailed, PromptTooCostly, RequestInvalid
from services.inference.engines.prompts.frames import Kind, pack_question
from services.inference.engines.prompts.workers import WorkerLimits, Workers

log = structlog.get_logger()

# A replayed answer or the grammar of many tools; a question is bounded by what callers may send.
ANSWER_BYTES_MAX = 16 << 20
LOAD_PAUSE_S = 60.0
PROGRAM = "services.inference.engines.answers.answer_program"


@dataclass(frozen=True, kw_only=True)
class ReadingLimits:
    """What reading may take: a part of an answer, all of an answer, and the grammar of a form."""

    part_s_max: float
    answer_s_max: float
    form_s_max: float
    memory_bytes_max: int
    load_s_max: float


@dataclass(frozen=True, kw_only=True)
class Guide:
    """How tokens are chosen: as vLLM's StructuredOutputsParams takes it, None for freely."""

    structured: Mapping[str, Any] | None = None
    # The parser needs to see them.
    special_tokens: bool = False


class AnswerReading:
    """One process reads all answers of a model, one part at a time, and one prepares forms, so that no answer waits for
    a stranger's schema. Each is started by the first who needs it."""

    def __init__(self, parsers: AnswerParsers, limits: ReadingLimits) -> None:
        self._parsers = parsers
        self._limits = limits
        self._reads = ReadingProcess(parsers, limits)
        self._prepares = ReadingProcess(parsers, limits)

    def open(self, tokenizer: Path) -> None:
        """Where the processes find the tokenizer; nothing starts."""
        self._reads.open(tokenizer)
        self._prepares.open(tokenizer)

    async def start(self) -> None:
        """Loads the parsers ahead of the first answer. PromptFailed when they cannot be loaded."""
        if self._parsers.tool or self._parsers.reasoning:
            await self._reads.start()
        if self._parsers.tool:
            # Every call with tools has a form.
            await self._prepares.start()

    async def stop(self) -> None:
        await self._reads.stop()
        await self._prepares.stop()

    async def guide(self, form: AnswerForm) -> Guide:
        """RequestInvalid for a form that cannot be kept, or whose grammar takes longer than it may."""
        if form.calls_tools and not self._parsers.tool:
            raise RequestInvalid(
                "tools",
                "no parser is known that reads calls of tools from this model's answers; use tool_choice none, or have "
                "whoever imports the model name one (finemesh models import --tool-parser)",
            )
        if not (form.is_guided or form.calls_tools):
            return Guide()
        field_name = "response_format" if form.response is not ResponseKind.TEXT else "tools"
        try:
            answer = await self._prepares.ask({"do": "form", "form": packed_form(form)}, self._limits.form_s_max)
        except PromptTooCostly as error:
            limit = f"{self._limits.form_s_max:g} s (guide_s_max) or more memory than it may"
            raise RequestInvalid(field_name, f"takes more than {limit} to prepare; make it smaller") from error
        if "failed" in answer:
            raise RequestInvalid(field_name, f"cannot be kept: {answer['failed']}")
        return Guide(structured=answer["guide"], special_tokens=answer["special_tokens"])

    def reader(self, request_id: str, form: AnswerForm | None, prompt_token_ids: Sequence[int]) -> AnswerReader | None:
        """Reads one answer with all its choices; None where the text is all there is."""
        if form is None or not (form.calls_tools or keeps_thoughts(self._parsers.reasoning, guided=form.is_guided)):
            return None
        return AnswerReader(self._reads, request_id, form, prompt_token_ids, part_s_max=self._limits.part_s_max)


class ReadingProcess:
    """A process with the parsers of a model, asked one question at a time."""

    def __init__(self, parsers: AnswerParsers, limits: ReadingLimits) -> None:
        self._parsers = parsers
        self._limits = limits
        self._workers: Workers | None = None
        self._turn = asyncio.Lock()
        # Why the process did not start, and until when that is believed.
        self._problem: tuple[str, float] | None = None

    def open(self, tokenizer: Path) -> None:
        limits, parsers = self._limits, self._parsers
        self._workers = Workers(
            tokenizer,
            WorkerLimits(count=1, memory_bytes_max=limits.memory_bytes_max, load_s_max=limits.load_s_max),
            program=PROGRAM,
            arguments=(parsers.tool, parsers.reasoning, str(limits.answer_s_max)),
        )

    async def start(self) -> None:
        """PromptFailed when the parsers cannot be loaded."""
        if self._workers is not None:
            async with self._turn:
                await self._load(self._workers)

    async def stop(self) -> None:
        if self._workers is not None:
            await self._workers.stop()

    async def ask(self, question: dict[str, Any], seconds_max: float) -> dict[str, Any]:
        """PromptTooCostly or PromptFailed when the process was killed over it, RequestInvalid for its refusal."""
        if self._workers is None:
            raise EngineFailed("the engine is not running")
        async with self._turn:
            await self._load(self._workers)
            kind, body = await self._workers.ask(
                pack_question(question), seconds_max, is_long=False, answer_bytes_max=ANSWER_BYTES_MAX
            )
        if kind is Kind.REFUSED:
            field_name, problem = json.loads(body)
            raise RequestInvalid(field_name, problem)
        if kind is not Kind.TEXTS:
            raise PromptFailed("the process that reads answers gave none")
        answer: dict[str, Any] = json.loads(body)
        return answer

    async def _load(self, workers: Workers) -> None:
        """Starts the process, or says why it did not start a moment ago: each attempt takes a dozen seconds."""
        now_s = asyncio.get_running_loop().time()
        if self._problem is not None and now_s < self._problem[1]:
            raise PromptFailed(self._problem[0])
        try:
            await workers.start()
        except EngineFailed as error:
            named = " and ".join(filter(None, (self._parsers.tool, self._parsers.reasoning))) or "none"
            problem = f"what reads this model's answers (parsers: {named}) cannot be loaded: {error}"
            self._problem = problem, asyncio.get_running_loop().time() + LOAD_PAUSE_S
            raise PromptFailed(problem) from error


@dataclass(kw_only=True)
class _Choice:
    """What was asked about one choice, for a process that never heard of it."""

    name: str
    parts: list[dict[str, Any]] = field(default_factory=list)
    # Nobody reads it any more: its text is passed on as it is.
    is_plain: bool = False
    calls: bool = False


class AnswerReader:
    """`read` every chunk of a request in order, and `close` at the end, also of one that is left."""

    def __init__(
        self,
        process: ReadingProcess,
        request_id: str,
        form: AnswerForm,
        prompt_token_ids: Sequence[int],
        *,
        part_s_max: float,
    ) -> None:
        self._process = process
        self._form = form
        self._begin = {"form": packed_form(form), "prompt": list(prompt_token_ids)}
        self._part_s_max = part_s_max
        self._names = (f"{request_id}/{number}" for number in itertools.count())
        self._choices: dict[int, _Choice] = {}

    async def read(self, chunk: Chunk) -> Chunk:
        """The chunk with thoughts, text and calls apart."""
        choice = self._choices.get(chunk.choice)
        if choice is None:
            choice = self._choices[chunk.choice] = _Choice(name=next(self._names))
        if choice.is_plain:
            return chunk
        part = {"text": chunk.text, "ids": list(chunk.token_ids), "finished": chunk.finish_reason is not None}
        try:
            found = await self._found(choice, part)
        except (PromptTooCostly, PromptFailed, EngineFailed) as error:
            found = {"failed": str(error)}
        if "failed" in found:
            log.warning("answer_not_read", answer=choice.name, problem=found["failed"])
            choice.is_plain = True
            choice.parts.clear()
            return chunk
        calls = tuple(
            ToolCallDelta(index=index, id=id, name=name, arguments=arguments)
            for index, id, name, arguments in found["calls"]
            if self._form.calls_tools and (index == 0 or self._form.parallel_tool_calls)
        )
        choice.calls |= bool(calls)
        reason = chunk.finish_reason
        if reason is FinishReason.STOP and choice.calls:
            reason = FinishReason.TOOL_CALLS
        return replace(chunk, text=found["text"], reasoning=found["reasoning"], tool_calls=calls, finish_reason=reason)

    async def close(self) -> None:
        """The process forgets what it keeps of the request."""
        for choice in self._choices.values():
            if not choice.is_plain and not (choice.parts and choice.parts[-1]["finished"]):
                try:
                    await self._process.ask({"do": "end", "answer": choice.name}, self._part_s_max)
                except EngineError as error:
                    log.info("answer_not_ended", answer=choice.name, problem=str(error))

    async def _found(self, choice: _Choice, part: dict[str, Any]) -> dict[str, Any]:
        begins = not choice.parts
        choice.parts.append(part)
        question = {"do": "part", "answer": choice.name, "begins": begins, "parts": [part]}
        found = await self._process.ask(question | (self._begin if begins else {}), self._part_s_max)
        if "unknown" in found:
            # Its process was killed over another answer: the next one reads this one from its beginning.
            question = {"do": "part", "answer": choice.name, "begins": True, "parts": choice.parts}
            found = await self._process.ask(question | self._begin, self._part_s_max)
        return found
