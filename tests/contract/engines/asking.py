"""How the engine suites ask: one request, all of its chunks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import aclosing

from services.inference.engines.answer_chunks import Chunk
from services.inference.engines.answer_form import AnswerForm
from services.inference.engines.base import Engine, GenerateRequest, Sampling

GREEDY = Sampling(temperature=0.0, completion_tokens_max=24)
_numbers = itertools.count()


def request_for(
    prompt: Sequence[int], sampling: Sampling = GREEDY, *, adapter: str | None = None, form: AnswerForm | None = None
) -> GenerateRequest:
    return GenerateRequest(
        request_id=f"request-{next(_numbers)}",
        prompt_token_ids=prompt,
        sampling=sampling,
        adapter_revision=adapter,
        form=form,
    )


async def ask(engine: Engine, request: GenerateRequest) -> list[Chunk]:
    async with aclosing(engine.generate(request)) as chunks:
        return [chunk async for chunk in chunks]


def text_of(chunks: Sequence[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def tokens_of(chunks: Sequence[Chunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids]
