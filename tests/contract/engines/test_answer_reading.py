"""Reading answers with vLLM's parsers: the same however the text is cut, and plain text when reading fails.

One process reads for all tests; it takes a dozen seconds to import vLLM, which no cheaper test can stand for.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.inference.engines.answer_chunks import Chunk, FinishReason, Usage
from services.inference.engines.answer_form import AnswerForm, AnswerParsers, ResponseKind, ToolUse
from services.inference.engines.answers.answer_reading import AnswerReader, AnswerReading, ReadingLimits
from services.inference.engines.base import PromptFailed, RequestInvalid
from services.inference.engines.prompts.frames import WORDS_BYTES_MAX

LIMITS = ReadingLimits(part_s_max=60, answer_s_max=60, form_s_max=60, memory_bytes_max=1 << 30, load_s_max=300)
TOOLS = ({"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}},)
FORM = AnswerForm(tools=TOOLS)
CALL = '<tool_call>\n{"name": "weather", "arguments": {"town": "Rome"}}\n</tool_call>'
ANSWER = f"I have to look.</think>One moment. {CALL}\n{CALL}"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def reading(base_model: Path) -> AsyncIterator[AnswerReading]:
    made = AnswerReading(AnswerParsers(tool="hermes", reasoning="qwen3"), LIMITS)
    made.open(base_model)
    await made.start()
    yield made
    await made.stop()


def chunks_of(text: str, cuts: Sequence[int]) -> list[Chunk]:
    places = sorted({0, len(text), *(cut % len(text) for cut in cuts)})
    return [
        Chunk(
            text=text[begin:end],
            token_ids=(300 + end % 100,),
            usage=Usage(prompt_tokens=1, completion_tokens=end),
            finish_reason=FinishReason.STOP if end == len(text) else None,
            is_last=end == len(text),
        )
        for begin, end in itertools.pairwise(places)
    ]


async def read(reader: AnswerReader, chunks: Sequence[Chunk]) -> tuple[str, str, list[tuple[str, object]], str]:
    """Thoughts, text, calls and how it ended."""
    found = [await reader.read(chunk) for chunk in chunks]
    await reader.close()
    calls: dict[int, list[str]] = {}
    for call in (call for chunk in found for call in chunk.tool_calls):
        told = calls.setdefault(call.index, ["", ""])
        told[0] += call.name
        told[1] += call.arguments
    return (
        "".join(chunk.reasoning for chunk in found).strip(),
        "".join(chunk.text for chunk in found).strip(),
        [(name, json.loads(arguments)) for name, arguments in calls.values()],
        str(found[-1].finish_reason),
    )


def reader_of(reading: AnswerReading, form: AnswerForm = FORM) -> AnswerReader:
    reader = reading.reader("gen", form, [1, 2, 3])
    assert reader is not None
    return reader


READ = ("I have to look.", "One moment.", [("weather", {"town": "Rome"})] * 2, "tool_calls")


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(cuts=st.lists(st.integers(1, len(ANSWER) - 1), max_size=60), forget_at=st.none() | st.integers(0, 60))
async def test_an_answer_is_read_the_same_however_it_is_cut(
    reading: AnswerReading, cuts: list[int], forget_at: int | None
) -> None:
    """Also when the process that read its beginning is gone."""
    reader, found = reader_of(reading), []
    chunks = chunks_of(ANSWER, cuts)
    for at, chunk in enumerate(chunks):
        if at == forget_at:
            await reading._reads.ask({"do": "end", "answer": "gen/0"}, 60)
        found.append(await reader.read(chunk))
    assert (await read(_Told(found), found)) == READ  # type: ignore[arg-type]


class _Told:
    """What was read already, for `read` to put together."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self._chunks = iter(chunks)

    async def read(self, chunk: Chunk) -> Chunk:
        return next(self._chunks)

    async def close(self) -> None:
        return


async def test_one_call_is_all_where_calls_in_parallel_are_not_wanted(reading: AnswerReading) -> None:
    form = AnswerForm(tools=TOOLS, parallel_tool_calls=False)
    thoughts, text, calls, _ = await read(reader_of(reading, form), chunks_of(ANSWER, range(0, 200, 7)))
    assert (thoughts, text, calls) == (READ[0], READ[1], READ[2][:1])


async def test_nothing_is_called_where_no_tool_may_be(reading: AnswerReading) -> None:
    form = AnswerForm(tools=TOOLS, tool_use=ToolUse.NONE)
    thoughts, text, calls, ended = await read(reader_of(reading, form), chunks_of(ANSWER, range(0, 200, 7)))
    assert (thoughts, text, calls, ended) == (READ[0], f"One moment. {CALL}\n{CALL}", [], "stop")


async def test_tools_without_a_parser_are_refused_with_the_cure() -> None:
    bare = AnswerReading(AnswerParsers(), LIMITS)
    assert bare.reader("gen", AnswerForm(), [1]) is None
    with pytest.raises(RequestInvalid, match="--tool-parser"):
        await bare.guide(FORM)
    await bare.guide(AnswerForm(tools=TOOLS, tool_use=ToolUse.NONE))


async def test_an_answer_that_takes_too_long_becomes_its_own_text(reading: AnswerReading) -> None:
    """And its process is replaced: others are read as before."""
    beside = reader_of(reading)
    chunks = chunks_of(ANSWER, range(0, 200, 9))
    first = await beside.read(chunks[0])
    hasty = AnswerReader(reading._reads, "hasty", FORM, [1, 2, 3], part_s_max=1e-6)
    assert [await hasty.read(chunk) for chunk in chunks] == chunks
    await hasty.close()
    found = [first, *[await beside.read(chunk) for chunk in chunks[1:]]]
    assert (await read(_Told(found), found)) == READ  # type: ignore[arg-type]


async def test_what_takes_too_long_to_prepare_is_refused(reading: AnswerReading) -> None:
    reading._limits = replace(LIMITS, form_s_max=1e-6)
    try:
        with pytest.raises(RequestInvalid, match="guide_s_max") as caught:
            await reading.guide(AnswerForm(response=ResponseKind.JSON_OBJECT))
    finally:
        reading._limits = LIMITS
    assert caught.value.field_name == "response_format"
    assert (await reading.guide(AnswerForm(response=ResponseKind.JSON_OBJECT))).structured


async def test_many_large_tools_have_a_grammar(reading: AnswerReading) -> None:
    """Whose description is longer than most answers of such a process."""
    parameters = {"type": "object", "properties": {"town": {"enum": [f"town {number}" for number in range(400)]}}}
    tools = tuple(
        {"type": "function", "function": {"name": f"tool_{number}", "parameters": parameters}} for number in range(128)
    )
    guide = await reading.guide(AnswerForm(tools=tools, tool_use=ToolUse.REQUIRED))
    assert guide.structured is not None and len(guide.structured["structural_tag"]) > WORDS_BYTES_MAX // 2


async def test_a_parser_that_lacks_its_tokens_says_so_and_is_not_tried_at_every_call(base_model: Path) -> None:
    broken = AnswerReading(AnswerParsers(tool="mistral"), LIMITS)
    broken.open(base_model)
    with pytest.raises(PromptFailed, match="mistral") as caught:
        await broken.guide(FORM)
    assert broken._prepares._problem is not None
    with pytest.raises(PromptFailed) as again:
        await broken.guide(FORM)
    assert str(again.value) == str(caught.value)
    await broken.stop()
