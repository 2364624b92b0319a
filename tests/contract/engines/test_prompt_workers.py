"""A stranger's chat template and tokenizer run within bounds: a kill, a typed answer, and others are served."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TypeVar

import pytest
import pytest_asyncio

from formats.rows import Message
from services.inference.engines.base import ContextTooLong, PromptFailed, PromptTooCostly, RequestInvalid
from services.inference.engines.prompts.frames import HEAD, Kind, pack_question
from services.inference.engines.prompts.prompt_tokenizer import PromptTokenizer
from services.inference.engines.prompts.render_program import answer, answered
from services.inference.engines.prompts.renderer import PromptRenderer
from tests.contract.engines.prompting import limits
from tests.contract.engines.tiny_llama import train_tokenizer
from tests.harness.polling import eventually

T = TypeVar("T")
TEMPLATE = (
    "{% set text = messages[0].content %}"
    "{% if text == 'loop' %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    "{% elif text == 'wide' %}{{ text.center(2000000000) }}"
    "{% elif text == 'never' %}{{ raise_exception('not to me') }}"
    "{% else %}{{ text }}{% endif %}"
)
CONTEXT_TOKENS = 100


def said(text: str) -> list[Message]:
    return [Message(role="user", content=text)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("model"), train_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"vocab_size": len(tokenizer)}))
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def prompts(folder: Path) -> AsyncIterator[PromptRenderer]:
    os.environ["FINEMESH_NATS_TOKEN"] = "secret"
    made = PromptRenderer(folder, limits(memory_bytes_max=256 << 20))
    await made.start(CONTEXT_TOKENS)
    yield made
    await made.stop()
    del os.environ["FINEMESH_NATS_TOKEN"]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def hasty(folder: Path) -> AsyncIterator[PromptRenderer]:
    """Has half a second for a short prompt: only one that loops takes so long, whatever else this machine does."""
    made = PromptRenderer(folder, limits(short_s_max=0.5))
    await made.start(CONTEXT_TOKENS)
    yield made
    await made.stop()


def leader_of(prompts: PromptRenderer) -> int:
    assert prompts._workers._leader is not None
    return prompts._workers._leader.pid


def workers_of(prompts: PromptRenderer) -> set[int]:
    leader = leader_of(prompts)
    return {int(pid) for pid in Path(f"/proc/{leader}/task/{leader}/children").read_text().split()}


async def test_a_loop_is_stopped_and_the_others_do_not_wait(hasty: PromptRenderer) -> None:
    looping = asyncio.ensure_future(hasty.render_chat(said("loop")))
    await asyncio.sleep(0)
    ids = [await hasty.render_chat(said("hello")) for _ in range(10)]
    assert len(set(ids)) == 1
    assert not looping.done()
    with pytest.raises(PromptTooCostly, match=r"more than 0\.5 s"):
        await looping
    assert await hasty.render_chat(said("hello")) == ids[0]


async def test_memory_is_bounded(prompts: PromptRenderer) -> None:
    with pytest.raises(PromptTooCostly, match=f"more than {256 << 20} bytes"):
        await prompts.render_chat(said("wide"))
    assert await prompts.render_chat(said("hello"))


async def test_who_leaves_takes_the_work_along(prompts: PromptRenderer) -> None:
    # Both workers are forked by the time that each has answered.
    await asyncio.gather(*(prompts.render_chat(said(f"hello {number}")) for number in range(4)))
    before = await eventually(lambda: _now(workers_of(prompts)), lambda found: len(found) == 2)
    looping = asyncio.ensure_future(prompts.render_chat(said("loop")))
    await asyncio.sleep(0.05)
    looping.cancel()
    after = await eventually(lambda: _now(workers_of(prompts)), lambda found: len(found - before) == 1)
    assert len(after) == 2
    assert await prompts.render_chat(said("hello"))


async def test_a_worker_that_dies_is_replaced_and_only_its_call_fails(prompts: PromptRenderer) -> None:
    looping = asyncio.ensure_future(prompts.render_chat(said("loop")))
    await asyncio.sleep(0.05)
    assert await prompts.render_chat(said("hello"))
    for pid in workers_of(prompts):
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(PromptFailed):
        await looping


async def test_nobody_is_blamed_when_all_processes_die(prompts: PromptRenderer) -> None:
    await prompts.render_chat(said("hello"))
    leader = leader_of(prompts)
    waiting = asyncio.ensure_future(prompts.render_chat(said("loop")))
    await asyncio.sleep(0.05)
    os.kill(leader, signal.SIGKILL)
    # The loop goes on with a worker of the next one.
    await eventually(lambda: _now(leader_of(prompts)), lambda found: found != leader)
    assert await prompts.render_chat(said("hello"))
    assert not waiting.done()
    waiting.cancel()


async def test_its_processes_see_no_secret(prompts: PromptRenderer) -> None:
    assert b"secret" not in Path(f"/proc/{leader_of(prompts)}/environ").read_bytes()


async def test_refusals_are_typed(prompts: PromptRenderer) -> None:
    with pytest.raises(RequestInvalid, match="not to me"):
        await prompts.render_chat(said("never"))
    with pytest.raises(ContextTooLong, match=f"the context holds {CONTEXT_TOKENS}"):
        await prompts.render_text("word " * 1000)
    with pytest.raises(RequestInvalid):
        await prompts.render_text("a lone \ud800 surrogate")
    ids = await prompts.render_text("some words")
    texts = await prompts.texts_of(ids)
    assert "".join(texts[id] for id in ids).endswith("some words")


class _Panicking(PromptTokenizer):
    def __init__(self) -> None:
        """There is no model."""

    def text_ids(self, text: str, *, opening: bool) -> list[int]:
        raise KeyboardInterrupt("as a panic, none of the usual exceptions")


def test_a_panic_of_the_tokenizer_is_an_answer() -> None:
    question = pack_question({"text": "x", "opening": True, "tokens_max": 1})
    kind, _ = HEAD.unpack(answered(question[4:], _Panicking())[: HEAD.size])
    assert kind == Kind.BROKEN
    with pytest.raises(KeyboardInterrupt):
        answer({"text": "x", "opening": True, "tokens_max": 1}, _Panicking())


async def _now(found: T) -> T:
    return found
