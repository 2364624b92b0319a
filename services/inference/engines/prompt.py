"""Turns conversations and raw text into token ids with the model's own tokenizer. Not pure: disk, threads.

The tokenizer works in threads beside the event loop; the template runs in the sandboxed Jinja environment of
transformers. This module refuses to know engines.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer

from services.inference.engines.base import EngineFailed, Message, RequestInvalid

T = TypeVar("T")


class PromptRenderer:
    """Short prompts have a tokenizer of their own: one of megabytes takes seconds, and only other long ones wait."""

    def __init__(self, model_path: Path, *, short_chars_max: int) -> None:
        self._short_chars_max = short_chars_max
        self._short = _Lane(model_path, "prompt")
        self._long = _Lane(model_path, "long-prompt")

    async def start(self) -> None:
        """Load the tokenizer; EngineFailed when the folder has none that works without running its own code."""
        # One after the other: the library imports parts of itself meanwhile.
        await self._short.start()
        await self._long.start()

    def stop(self) -> None:
        """Let the threads end after the call they may be in."""
        self._short.stop()
        self._long.stop()

    async def render_chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Token ids with the generation prompt; the template is applied here and nowhere else."""
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            ids = await self._lane(sum(len(message.content) for message in messages)).run(
                lambda tokenizer: tokenizer.apply_chat_template(
                    turns, add_generation_prompt=True, tokenize=True, return_dict=False
                )
            )
        except (TemplateError, TypeError, ValueError) as error:
            # The template's own words (a role it does not take, turns that must alternate) help the caller.
            raise RequestInvalid("messages", f"the chat template of this model refuses them: {error}") from error
        return tuple(ids)

    async def render_text(self, text: str) -> tuple[int, ...]:
        """Token ids with the special tokens that the tokenizer adds around a text."""
        return tuple(await self._encode(text, special_tokens=True))

    async def count_tokens(self, text: str) -> int:
        """Tokens of the text alone."""
        return len(await self._encode(text, special_tokens=False))

    def text_of(self, token_id: int) -> str:
        """The text of one token, special ones included; read-only, so any thread may ask."""
        return str(self._short.tokenizer.decode([token_id]))

    async def _encode(self, text: str, *, special_tokens: bool) -> list[int]:
        ids: list[int] = await self._lane(len(text)).run(
            lambda tokenizer: tokenizer.encode(text, add_special_tokens=special_tokens)
        )
        return ids

    def _lane(self, chars: int) -> _Lane:
        return self._short if chars <= self._short_chars_max else self._long


class _Lane:
    """One tokenizer and the only thread that may touch it: its Rust half refuses to be borrowed twice."""

    def __init__(self, model_path: Path, name: str) -> None:
        self._model_path = model_path
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self.tokenizer: Any = None

    async def start(self) -> None:
        try:
            self.tokenizer = await self.run(
                lambda _: AutoTokenizer.from_pretrained(
                    self._model_path, local_files_only=True, trust_remote_code=False
                )
            )
        except (OSError, ValueError, KeyError) as error:
            raise EngineFailed(f"the tokenizer of {self._model_path} cannot be loaded: {error}") from error

    def stop(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def run(self, call: Callable[[Any], T]) -> T:
        """The result of the call, which gets the tokenizer; calls take turns in the order in which they came."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: call(self.tokenizer))
