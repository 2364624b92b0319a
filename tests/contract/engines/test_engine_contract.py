"""What every engine promises, asked of the stub and of a real vLLM alike.

The vLLM half costs one engine start (about twenty seconds); it earns that the stub may stand for vLLM elsewhere.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from contextlib import aclosing
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from formats.rows import Message, ToolCall
from services.inference.engines.answer_chunks import FinishReason
from services.inference.engines.answer_form import AnswerForm, ResponseKind, ToolUse
from services.inference.engines.base import (
    AdapterInvalid,
    AdapterNotLoaded,
    ContextTooLong,
    EngineBusy,
    RequestInvalid,
    Sampling,
)
from tests.contract.engines.asking import GREEDY, ask, request_for, text_of, tokens_of
from tests.contract.engines.conftest import RANK, SETTINGS, Subject

TOWN = {
    "type": "object",
    "properties": {"town": {"enum": ["Paris", "Rome"]}},
    "required": ["town"],
    "additionalProperties": False,
}
TOOLS = ({"type": "function", "function": {"name": "weather", "parameters": TOWN}},)
HELLO = [Message(role="user", content="Serialize the object as a JSON formatted stream.")]


async def test_is_healthy_and_knows_its_context(subject: Subject) -> None:
    await subject.engine.health()
    assert subject.engine.context_tokens_max == 256
    assert subject.engine.requests_unfinished == 0


async def test_greedy_answers_are_the_same_every_time(subject: Subject) -> None:
    prompt = await subject.engine.render_chat(HELLO)
    first, second = [await ask(subject.engine, request_for(prompt)) for _ in range(2)]
    assert tokens_of(first) == tokens_of(second)
    assert text_of(first) == text_of(second)


async def test_an_answer_comes_in_chunks_and_the_last_one_says_why_it_ended(subject: Subject) -> None:
    prompt = await subject.engine.render_chat(HELLO)
    chunks = await ask(subject.engine, request_for(prompt))
    assert len(chunks) > 1
    assert [chunk.finish_reason is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


async def test_usage_counts_every_token_in_every_chunk(subject: Subject) -> None:
    prompt = await subject.engine.render_chat(HELLO)
    seen = 0
    for chunk in await ask(subject.engine, request_for(prompt)):
        seen += len(chunk.token_ids)
        assert chunk.usage.completion_tokens == seen
        assert chunk.usage.prompt_tokens == len(prompt)


async def test_the_token_limit_ends_an_answer(subject: Subject) -> None:
    prompt = await subject.engine.render_chat(HELLO)
    chunks = await ask(subject.engine, request_for(prompt, Sampling(temperature=0.0, completion_tokens_max=5)))
    assert len(tokens_of(chunks)) == 5
    assert chunks[-1].finish_reason is FinishReason.LENGTH


async def test_a_stop_string_ends_an_answer_and_is_never_sent(subject: Subject) -> None:
    prompt = await subject.engine.render_chat(HELLO)
    full = text_of(await ask(subject.engine, request_for(prompt)))
    stop = full[8:11]
    chunks = await ask(subject.engine, request_for(prompt, dataclasses.replace(GREEDY, stop=(stop,))))
    assert text_of(chunks) == full[: full.index(stop)]
    assert chunks[-1].finish_reason is FinishReason.STOP
    assert chunks[-1].usage.completion_tokens == len(tokens_of(chunks))


async def test_a_seed_makes_sampling_repeatable(subject: Subject) -> None:
    prompt = await subject.engine.render_chat(HELLO)
    answers = [
        tokens_of(
            await ask(subject.engine, request_for(prompt, dataclasses.replace(GREEDY, temperature=1.5, seed=seed)))
        )
        for seed in (1, 1, 2)
    ]
    assert answers[0] == answers[1]
    assert answers[0] != answers[2]


async def test_logprobs_name_the_chosen_token_first_when_greedy(subject: Subject) -> None:
    prompt = await subject.engine.render_chat(HELLO)
    sampling = dataclasses.replace(GREEDY, completion_tokens_max=4, logprobs=3)
    chunks = await ask(subject.engine, request_for(prompt, sampling))
    entries = [entry for chunk in chunks for entry in chunk.logprobs]
    assert [entry.token_id for entry in entries] == tokens_of(chunks)
    for entry in entries:
        assert entry.logprob <= 0
        assert len(entry.alternatives) == 3
        assert entry.alternatives[0].token_id == entry.token_id
        assert sorted((one.logprob for one in entry.alternatives), reverse=True) == [
            one.logprob for one in entry.alternatives
        ]
    assert not any(chunk.logprobs for chunk in await ask(subject.engine, request_for(prompt)))


async def test_choices_are_answers_of_their_own_and_counted_together(subject: Subject) -> None:
    prompt = await subject.engine.render_chat(HELLO)
    sampling = Sampling(temperature=1.5, seed=3, choices=3, completion_tokens_max=12)
    chunks = await ask(subject.engine, request_for(prompt, sampling))
    answers = [[chunk for chunk in chunks if chunk.choice == choice] for choice in range(3)]
    assert len({tuple(tokens_of(answer)) for answer in answers}) > 1
    for answer in answers:
        assert [chunk.finish_reason is not None for chunk in answer] == [False] * (len(answer) - 1) + [True]
    assert [chunk.is_last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].usage.completion_tokens == len(tokens_of(chunks))
    assert chunks[-1].usage.prompt_tokens == len(prompt)
    assert subject.engine.requests_unfinished == 0


async def test_choices_count_for_the_queue(subject: Subject) -> None:
    prompt = await subject.engine.render_chat(HELLO)
    sampling = Sampling(choices=SETTINGS.queue_requests_max + 1, completion_tokens_max=1)
    with pytest.raises(EngineBusy):
        await ask(subject.engine, request_for(prompt, sampling))


async def test_an_answer_has_its_least_length_and_goes_on_where_end_tokens_are_ignored(subject: Subject) -> None:
    prompt = await subject.engine.render_chat(HELLO)
    for sampling in (
        Sampling(temperature=0.0, completion_tokens_max=40, completion_tokens_min=40),
        Sampling(temperature=0.0, completion_tokens_max=40, ignore_eos=True),
    ):
        assert len(tokens_of(await ask(subject.engine, request_for(prompt, sampling)))) == 40


async def test_what_tools_say_is_part_of_the_prompt(subject: Subject) -> None:
    """Every field of a message that the template shows changes the prompt; none is left out on the way."""
    call = ToolCall(id="c1", name="weather", arguments={"town": "Paris"})
    talks = [
        HELLO,
        [*HELLO, Message(role="assistant", content="", tool_calls=(call,))],
        [*HELLO, Message(role="assistant", content="", reasoning="hm", tool_calls=(call,))],
        [*HELLO, Message(role="tool", content="sunny", tool_call_id="c1", name="weather")],
    ]
    prompts = [await subject.engine.render_chat(talk) for talk in talks]
    prompts.append(await subject.engine.render_chat(HELLO, [{"type": "function", "function": {"name": "weather"}}]))
    prompts += [await subject.engine.render_chat(HELLO, enable_thinking=thinks) for thinks in (True, False)]
    assert len(set(prompts)) == len(prompts)


async def test_a_tool_that_must_be_called_is_called(subject: Subject) -> None:
    """Also by random weights, which know of no tools: the choice of tokens is bound."""
    prompt = await subject.engine.render_chat(HELLO)
    form = AnswerForm(tools=TOOLS, tool_use=ToolUse.REQUIRED, function="weather", parallel_tool_calls=False)
    await subject.engine.check_form(form)
    sampling = Sampling(temperature=1.0, seed=2, choices=2, completion_tokens_max=200)
    chunks = await ask(subject.engine, request_for(prompt, sampling, form=form))
    for choice in range(2):
        answer = [chunk for chunk in chunks if chunk.choice == choice]
        calls = [call for chunk in answer for call in chunk.tool_calls]
        assert {call.index for call in calls} == {0}
        assert "".join(call.name for call in calls) == "weather"
        assert calls[0].id
        arguments = json.loads("".join(call.arguments for call in calls))
        assert arguments in [{"town": "Paris"}, {"town": "Rome"}] if subject.kind == "vllm" else arguments
        assert not text_of(answer).strip()
        assert answer[-1].finish_reason is FinishReason.TOOL_CALLS
    assert chunks[-1].usage.completion_tokens == len(tokens_of(chunks))


async def test_an_answer_keeps_its_schema_or_the_engine_says_that_it_keeps_none(subject: Subject) -> None:
    prompt = await subject.engine.render_chat(HELLO)
    form = AnswerForm(response=ResponseKind.JSON_SCHEMA, json_schema=json.dumps(TOWN))
    if subject.kind == "stub":
        with pytest.raises(RequestInvalid):
            await subject.engine.check_form(form)
        return
    await subject.engine.check_form(form)
    sampling = Sampling(temperature=1.0, seed=4, completion_tokens_max=200)
    answer = text_of(await ask(subject.engine, request_for(prompt, sampling, form=form)))
    assert json.loads(answer) in [{"town": "Paris"}, {"town": "Rome"}]


@pytest.mark.parametrize("schema", ['{"type": "objekt"}', '{"type": "string", "pattern": "(("}'])
async def test_a_schema_that_nothing_can_keep_is_refused_by_its_field(subject: Subject, schema: str) -> None:
    form = AnswerForm(response=ResponseKind.JSON_SCHEMA, json_schema=schema)
    with pytest.raises(RequestInvalid) as caught:
        await subject.engine.check_form(form)
    assert caught.value.field_name == "response_format"


@pytest.mark.parametrize("sampling", [Sampling(completion_tokens_min=3), Sampling(ignore_eos=True)])
async def test_an_answer_whose_form_ends_it_takes_no_length(subject: Subject, sampling: Sampling) -> None:
    """Tokens of which none may follow would have no probabilities."""
    forms = [
        AnswerForm(response=ResponseKind.JSON_OBJECT),
        AnswerForm(tools=TOOLS, tool_use=ToolUse.REQUIRED),
        AnswerForm(tools=TOOLS, parallel_tool_calls=False),
    ]
    for form in forms:
        with pytest.raises(RequestInvalid) as caught:
            await ask(subject.engine, request_for([20, 21], sampling, form=form))
        assert caught.value.field_name in ("min_tokens", "ignore_eos")


async def test_the_chat_template_is_applied_exactly_once(subject: Subject) -> None:
    turns = [
        Message(role="system", content="Be brief."),
        Message(role="user", content="dedent removes common leading whitespace"),
        Message(role="assistant", content="True"),
        Message(role="user", content="<|end|>why?"),
    ]
    ids = await subject.engine.render_chat(turns)
    assert list(ids) == await _expected_chat_ids(subject, turns)
    # What the engine counted is what was rendered: nothing is added between rendering and generating.
    assert (await ask(subject.engine, request_for(ids)))[-1].usage.prompt_tokens == len(ids)


async def _expected_chat_ids(subject: Subject, turns: list[Message]) -> list[int]:
    if subject.kind == "stub":
        roles = {"system": 1, "user": 2, "assistant": 3}
        expected = [5]
        for turn in turns:
            expected += [roles[turn.role], *(await subject.engine.render_text(turn.content))[1:], 4]
        return [*expected, 3]
    tokenizer = AutoTokenizer.from_pretrained(subject.base)
    text = "<s>" + "".join(f"<|{turn.role}|>{turn.content}<|end|>" for turn in turns) + "<|assistant|>"
    return list(tokenizer.encode(text, add_special_tokens=False))


async def test_a_role_the_template_does_not_take_is_refused(subject: Subject) -> None:
    with pytest.raises(RequestInvalid, match="role"):
        await subject.engine.render_chat([Message(role="oracle", content="hm")])


async def test_text_is_counted_as_it_is_rendered(subject: Subject) -> None:
    text = "Deserialize s to a Python object."
    assert await subject.engine.count_tokens("") == 0
    count = await subject.engine.count_tokens(text)
    assert count >= 6
    assert len(await subject.engine.render_text(text)) - count in (0, 1)


@pytest.mark.parametrize(("prompt_tokens", "completion_tokens"), [(256, None), (300, 1), (200, 57)])
async def test_what_does_not_fit_the_context_is_refused(
    subject: Subject, prompt_tokens: int, completion_tokens: int | None
) -> None:
    request = request_for([20] * prompt_tokens, Sampling(completion_tokens_max=completion_tokens))
    with pytest.raises(ContextTooLong) as caught:
        await ask(subject.engine, request)
    assert caught.value.prompt_tokens == prompt_tokens
    assert caught.value.context_tokens_max == 256
    assert subject.engine.requests_unfinished == 0


@pytest.mark.parametrize(
    ("sampling", "field_name"),
    [
        (Sampling(temperature=-0.1), "temperature"),
        (Sampling(temperature=float("nan")), "temperature"),
        (Sampling(top_p=0.0), "top_p"),
        (Sampling(top_k=-1), "top_k"),
        (Sampling(completion_tokens_max=0), "max_tokens"),
        (Sampling(presence_penalty=3.0), "presence_penalty"),
        (Sampling(logprobs=21), "top_logprobs"),
        (Sampling(stop=("",)), "stop"),
        (Sampling(seed=1 << 70), "seed"),
    ],
)
async def test_a_field_out_of_range_is_named(subject: Subject, sampling: Sampling, field_name: str) -> None:
    with pytest.raises(RequestInvalid) as caught:
        await ask(subject.engine, request_for([20, 21], sampling))
    assert caught.value.field_name == field_name


async def test_an_empty_prompt_is_refused(subject: Subject) -> None:
    with pytest.raises(RequestInvalid, match="prompt"):
        await ask(subject.engine, request_for([]))


async def test_leaving_a_stream_frees_its_place(subject: Subject) -> None:
    prompt = await subject.engine.render_chat(HELLO)
    long = Sampling(temperature=0.0)
    for _ in range(3 * SETTINGS.queue_requests_max):
        async with aclosing(subject.engine.generate(request_for(prompt, long))) as chunks:
            async for _chunk in chunks:
                break
        assert subject.engine.requests_unfinished == 0
    assert await ask(subject.engine, request_for(prompt))


async def test_cancelling_the_reader_frees_its_place(subject: Subject) -> None:
    prompt = await subject.engine.render_chat(HELLO)
    started = asyncio.Event()

    async def read() -> None:
        async with aclosing(subject.engine.generate(request_for(prompt, Sampling(temperature=0.0)))) as chunks:
            async for _chunk in chunks:
                started.set()
                await asyncio.Event().wait()

    reader = asyncio.create_task(read())
    await started.wait()
    assert subject.engine.requests_unfinished == 1
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert subject.engine.requests_unfinished == 0


async def test_more_requests_than_the_queue_holds_are_refused(subject: Subject) -> None:
    prompt = await subject.engine.render_chat(HELLO)
    open_streams = [subject.engine.generate(request_for(prompt, GREEDY)) for _ in range(SETTINGS.queue_requests_max)]
    firsts = [asyncio.ensure_future(anext(stream)) for stream in open_streams]
    # One turn of the loop, in which all of them ask.
    await asyncio.sleep(0)
    with pytest.raises(EngineBusy):
        await ask(subject.engine, request_for(prompt))
    await asyncio.wait(firsts[: SETTINGS.sequences_max], return_when=asyncio.FIRST_COMPLETED)
    for first, stream in zip(firsts, open_streams, strict=True):
        first.cancel()
        await asyncio.wait([first])
        await stream.aclose()
    assert subject.engine.requests_unfinished == 0


async def test_a_request_id_in_use_is_refused(subject: Subject) -> None:
    request = request_for(await subject.engine.render_chat(HELLO))
    async with aclosing(subject.engine.generate(request)) as chunks:
        await anext(chunks)
        with pytest.raises(RequestInvalid, match="request_id"):
            await ask(subject.engine, request)
    assert await ask(subject.engine, request)


async def test_an_adapter_changes_the_answer_and_only_its_own(subject: Subject, adapters: list[Path]) -> None:
    prompt = await subject.engine.render_chat(HELLO)
    plain = tokens_of(await ask(subject.engine, request_for(prompt)))
    await subject.engine.load_adapter("rv_one", adapters[0], RANK)
    await subject.engine.load_adapter("rv_two", adapters[1], RANK)
    together = await asyncio.gather(
        *(ask(subject.engine, request_for(prompt, adapter=name)) for name in ("rv_one", "rv_two", None))
    )
    one, two, base = (tokens_of(chunks) for chunks in together)
    assert base == plain
    assert one != plain
    assert two not in (one, plain)
    assert tokens_of(await ask(subject.engine, request_for(prompt, adapter="rv_one"))) == one


async def test_loading_an_adapter_again_changes_nothing(subject: Subject, adapters: list[Path], tmp_path: Path) -> None:
    prompt = await subject.engine.render_chat(HELLO)
    await subject.engine.load_adapter("rv_one", adapters[0], RANK)
    before = tokens_of(await ask(subject.engine, request_for(prompt, adapter="rv_one")))
    await subject.engine.load_adapter("rv_one", tmp_path / "elsewhere", RANK)
    assert tokens_of(await ask(subject.engine, request_for(prompt, adapter="rv_one"))) == before


async def test_more_adapters_than_fit_take_turns(subject: Subject, adapters: list[Path]) -> None:
    prompt = await subject.engine.render_chat(HELLO)
    names = ["rv_one", "rv_two", "rv_three"]
    for name, path in zip(names, adapters, strict=True):
        await subject.engine.load_adapter(name, path, RANK)
        assert len(subject.engine.adapters()) <= SETTINGS.adapters_resident_max
    assert subject.engine.adapters()[-1] == "rv_three"
    answers = [tokens_of(await ask(subject.engine, request_for(prompt, adapter=name))) for name in names + names]
    assert answers[:3] == answers[3:]
    assert len({tuple(answer) for answer in answers}) == 3


async def test_an_adapter_in_use_is_not_pushed_out(subject: Subject, adapters: list[Path]) -> None:
    prompt = await subject.engine.render_chat(HELLO)
    for name, path in (("rv_one", adapters[0]), ("rv_two", adapters[1])):
        await subject.engine.load_adapter(name, path, RANK)
    long = Sampling(temperature=0.0)
    async with (
        aclosing(subject.engine.generate(request_for(prompt, long, adapter="rv_one"))) as one,
        aclosing(subject.engine.generate(request_for(prompt, long, adapter="rv_two"))) as two,
    ):
        await asyncio.gather(anext(one), anext(two))
        with pytest.raises(EngineBusy):
            await subject.engine.load_adapter("rv_three", adapters[2], RANK)
    await subject.engine.load_adapter("rv_three", adapters[2], RANK)


async def test_an_unknown_adapter_is_refused(subject: Subject, adapters: list[Path]) -> None:
    prompt = await subject.engine.render_chat(HELLO)
    with pytest.raises(AdapterNotLoaded):
        await ask(subject.engine, request_for(prompt, adapter="rv_never"))
    await subject.engine.load_adapter("rv_gone", adapters[0], RANK)
    assert await subject.engine.unload_adapter("rv_gone")
    assert not await subject.engine.unload_adapter("rv_gone")
    assert "rv_gone" not in subject.engine.adapters()
    with pytest.raises(AdapterNotLoaded):
        await ask(subject.engine, request_for(prompt, adapter="rv_gone"))
    assert subject.engine.requests_unfinished == 0


async def test_a_broken_adapter_leaves_the_engine_serving(
    subject: Subject, broken_adapter: tuple[Path, int, str]
) -> None:
    path, rank, problem = broken_adapter
    resident = subject.engine.adapters()
    with pytest.raises(AdapterInvalid, match=problem) as caught:
        await subject.engine.load_adapter("rv_broken", path, rank)
    assert caught.value.revision == "rv_broken"
    assert subject.engine.adapters() == resident
    assert await ask(subject.engine, request_for(await subject.engine.render_chat(HELLO)))
