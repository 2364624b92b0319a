"""Asks a model the held-out questions through the openai client and the gRPC client, and counts right answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import openai

from finemesh_client.chat import sampling, user
from finemesh_client.cli.local.demo_dataset import Row
from finemesh_client.client import Client

QUESTIONS_AT_ONCE = 8
ANSWER_TOKENS_MAX = 8
# The first question starts the engine of the base model.
FIRST_ANSWER_TIMEOUT_S = 240.0


def is_right(answer: str, row: Row) -> bool:
    """Whether the answer is the module's name, bar white space and a final full stop."""
    return answer.strip().rstrip(".").strip() == row.answer


async def ask_openai(
    url: str, api_key: str, model: str, rows: Sequence[Row], on_answer: Callable[[], None]
) -> list[str]:
    """Greedy answers through the real openai client, some at once."""
    at_once = asyncio.Semaphore(QUESTIONS_AT_ONCE)
    async with openai.AsyncOpenAI(
        base_url=url, api_key=api_key, timeout=FIRST_ANSWER_TIMEOUT_S, max_retries=4
    ) as client:

        async def ask(row: Row) -> str:
            async with at_once:
                completion = await client.chat.completions.create(
                    model=model,
                    messages=[{"role": "user", "content": row.question}],
                    max_tokens=ANSWER_TOKENS_MAX,
                    temperature=0,
                )
            on_answer()
            return completion.choices[0].message.content or ""

        return list(await asyncio.gather(*(ask(row) for row in rows)))


async def ask_grpc(mesh: Client, model: str, rows: Sequence[Row]) -> list[str]:
    """Greedy answers through the gRPC client's stream, one after the other."""
    parameters = sampling(temperature=0.0, output_tokens_max=ANSWER_TOKENS_MAX)
    answers = []
    for row in rows:
        parts = [part.text_delta async for part in mesh.chat.stream(model, [user(row.question)], parameters)]
        answers.append("".join(parts))
    return answers


def accuracy(answers: Sequence[str], rows: Sequence[Row]) -> float:
    """Share of right answers, 0 to 1."""
    return sum(is_right(answer, row) for answer, row in zip(answers, rows, strict=True)) / len(rows)
