"""Turns conversations and raw text into token ids with the model's own tokenizer. Not pure: disk, a thread.

The tokenizer works in one thread beside the event loop; the template runs in the sandboxed Jinja environment of
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
    """One tokenizer and the only thread that may touch it: its Rust half refuses to be borrowed twice."""

    def __init__(self, model_path: Path) -> None:
        self._model_path = model_path
        self._tokenizer: Any = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prompt")

    async def start(self) -> None:
        """Load the tokenizer; EngineFailed when the folder has none that works without running its own code."""
        try:
            self._tokenizer = await self._in_thread(
                lambda: AutoTokenizer.from_pretrained(self._model_path, local_files_only=True, trust_remote_code=False)
            )
        except (OSError, ValueError, KeyError) as error:
            raise EngineFailed(f"the tokenizer of {self._model_path} cannot be loaded: {error}") from error

    def stop(self) -> None:
        """Let the thread end after the call it may be in."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def render_chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Token ids with the generation prompt; the template is applied here and nowhere else."""
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            ids = await self._in_thread(
                lambda: self._tokenizer.apply_chat_template(
                    turns, add_generation_prompt=True, tokenize=True, return_dict=False
                )
            )
        except (TemplateError, TypeError, ValueError) as error:
            # The template's own words (a role it does not take, turns that must alternate) help the caller.
            raise RequestInvalid("messages", f"the chat template of this model refuses them: {error}") from error
        return tuple(ids)

    async def render_text(self, text: str) -> tuple[int, ...]:
        """Token ids with the special tokens that the tokenizer adds around a text."""
        return tuple(await self._in_thread(lambda: self._tokenizer.encode(text, add_special_tokens=True)))

    async def count_tokens(self, text: str) -> int:
        """Tokens of the text alone."""
        return len(await self._in_thread(lambda: self._tokenizer.encode(text, add_special_tokens=False)))

    def text_of(self, token_id: int) -> str:
        """The text of one token, special ones included; read-only, so any thread may ask."""
        return str(self._tokenizer.decode([token_id]))

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)
