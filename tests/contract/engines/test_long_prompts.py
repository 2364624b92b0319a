"""A prompt that takes the tokenizer seconds keeps nobody else's short prompt waiting."""

from __future__ import annotations

import asyncio
from pathlib import Path

from formats.rows import Message
from services.inference.engines.prompts.renderer import PromptRenderer
from tests.contract.engines.prompting import limits
from tests.contract.engines.tiny_llama import train_tokenizer

SENTENCE = "Serialize the object as a JSON formatted stream. "
# Some tenths of a second of work on a core that has nothing else to do.
LONG = SENTENCE * 8_000


async def test_short_prompts_do_not_wait_for_a_long_one(tmp_path: Path) -> None:
    train_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    prompts = PromptRenderer(tmp_path, limits(short_chars_max=1000))
    await prompts.start(1 << 20)
    alone = await prompts.render_chat([Message(role="user", content="hello")])
    long = asyncio.ensure_future(prompts.render_text(LONG))
    await asyncio.sleep(0)
    for _ in range(3):
        assert await prompts.render_chat([Message(role="user", content="hello")]) == alone
    assert not long.done()
    # A sentence has the same tokens by whichever of the two tokenizers.
    short = await prompts.render_text(SENTENCE)
    assert (await long)[: len(short) - 1] == short[:-1]
    await prompts.stop()
