"""Turns conversations and raw text into token ids with the model's own tokenizer. Not pure: processes.

Tokenizer and chat template are a stranger's: they run in processes of their own (`render_program.py`), within limits of
time and memory. This module refuses to know engines.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formats.prompts.plain_messages import plain
from formats.rows import Message
from services.inference.engines.base import ContextTooLong, EngineFailed, PromptFailed, PromptTooCostly, RequestInvalid
from services.inference.engines.prompts.frames import WORDS_BYTES_MAX, Kind, pack_question, unpack_ids
from services.inference.engines.prompts.prompt_chars import prompt_chars
from services.inference.engines.prompts.workers import WorkerLimits, Workers

_ID_BYTES = 4
_TEXTS_KEPT_MAX = 65_536


@dataclass(frozen=True, kw_only=True)
class PromptLimits:
    """What a prompt may take. Those of more than `short_chars_max` characters are long."""

    short_chars_max: int
    short_s_max: float
    long_s_max: float
    workers: WorkerLimits


class PromptRenderer:
    """`start` once before anything else, `stop` at the end."""

    def __init__(self, model_path: Path, limits: PromptLimits) -> None:
        self._limits = limits
        self._workers = Workers(model_path, limits.workers)
        self._tokens_max = 0
        self._texts: dict[int, str] = {}

    async def start(self, tokens_max: int) -> None:
        """Load the tokenizer; EngineFailed when the folder has none that works without running its own code. Prompts of
        more than `tokens_max` are refused."""
        self._tokens_max = tokens_max
        if self._limits.workers.count:
            await self._workers.start()

    async def stop(self) -> None:
        """End the processes, whatever they are doing."""
        await self._workers.stop()

    async def render_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        enable_thinking: bool | None = None,
    ) -> tuple[int, ...]:
        """Token ids with the generation prompt; the template is applied here and nowhere else."""
        return await self._ids(
            prompt_chars(messages, tools),
            "messages",
            "the chat template of this model refuses them",
            messages=[plain(message) for message in messages],
            tools=list(tools),
            switches={} if enable_thinking is None else {"enable_thinking": enable_thinking},
        )

    async def render_text(self, text: str) -> tuple[int, ...]:
        """Token ids behind the special tokens that the tokenizer puts before a text; none behind it, where an answer
        goes on."""
        return await self._ids(len(text), "prompt", _NO_TOKENS, text=text, opening=True)

    async def count_tokens(self, text: str) -> int:
        """Tokens of the text alone."""
        return len(await self._ids(len(text), "prompt", _NO_TOKENS, text=text, opening=False))

    async def texts_of(self, token_ids: Sequence[int]) -> dict[int, str]:
        """The text of each token alone, special ones included."""
        known = {token_id: self._texts[token_id] for token_id in token_ids if token_id in self._texts}
        unknown = [token_id for token_id in dict.fromkeys(token_ids) if token_id not in known]
        if not unknown:
            return known
        texts = _texts(*await self._ask(0, WORDS_BYTES_MAX, ids=unknown))
        if len(texts) != len(unknown):
            raise PromptFailed("the tokenizer of this model gives no texts of its tokens")
        found = dict(zip(unknown, texts, strict=True))
        if len(self._texts) + len(found) > _TEXTS_KEPT_MAX:
            self._texts.clear()
        self._texts |= found
        return known | found

    async def _ids(self, chars: int, field: str, refusal: str, **question: Any) -> tuple[int, ...]:
        answer_bytes_max = max(WORDS_BYTES_MAX, self._tokens_max * _ID_BYTES)
        kind, body = await self._ask(chars, answer_bytes_max, tokens_max=self._tokens_max, **question)
        match kind:
            case Kind.IDS if len(body) % _ID_BYTES == 0:
                return unpack_ids(body)
            case Kind.TOO_MANY if body.isdigit():
                raise ContextTooLong(int(body), 1, self._tokens_max)
            case Kind.REFUSED:
                raise RequestInvalid(field, f"{refusal}: {body.decode(errors='replace')}")
        raise PromptFailed(f"the tokenizer of this model failed: {body.decode(errors='replace')}")

    async def _ask(self, chars: int, answer_bytes_max: int, **question: Any) -> tuple[Kind, bytes]:
        if not self._limits.workers.count:
            raise EngineFailed("this engine renders no prompts")
        is_long = chars > self._limits.short_chars_max
        kind, body = await self._workers.ask(
            pack_question(question),
            self._limits.long_s_max if is_long else self._limits.short_s_max,
            is_long=is_long,
            answer_bytes_max=answer_bytes_max,
        )
        if kind is Kind.MEMORY:
            raise PromptTooCostly(f"{self._limits.workers.memory_bytes_max} bytes of memory")
        return kind, body


_NO_TOKENS = "the tokenizer of this model does not take it"


def _texts(kind: Kind, body: bytes) -> list[str]:
    try:
        texts = json.loads(body) if kind is Kind.TEXTS else []
    except ValueError:
        return []
    return [str(text) for text in texts]
