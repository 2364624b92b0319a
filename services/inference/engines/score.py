"""Scores rows and answers questions with a base model and one adapter, or with a whole model. Not pure: os.

`python -m services.inference.engines.score < request.json` gives the serving engine's scores and answers to whoever
wants to compare them with its own.

Request: {"base_model": DIR, "export": DIR, "kind": "adapter" or "full", "rank": R, "rows": [[id, ...], ...],
"questions": [{"ids": [id, ...], "tokens_max": N}, ...]}.

The last line of standard output is {"log_probs": [[null, x, ...], ...], "answers": [{"ids": [id, ...], "stopped":
true}, ...]}: for each row one number for each token after those before it, null where there is none; for each question
the greedy answer that a caller gets, with the token that ended it. It is {"refused": "why"} when this engine does not
serve such a model. The program knows no tolerance and no job.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from services.inference.engines.answer_chunks import FinishReason
from services.inference.engines.base import AdapterInvalid, EngineSettings, GenerateRequest, Sampling
from services.inference.engines.choice import open_engine
from services.inference.engines.model_files import cache_bytes_per_token, context_tokens, read_config

if TYPE_CHECKING:
    from services.inference.engines.vllm import VllmEngine

_ADAPTER = "scored"
# The cache comes in blocks, and vLLM keeps some for itself.
_KV_CACHE_BYTES_MIN = 256 << 20
_KV_CACHE_MARGIN_TOKENS = 512
# Nothing but a check at the start when the cache's size is given: the trained module may still hold most of the GPU.
_GPU_MEMORY_FRACTION = 0.02


def main() -> int:
    parser = argparse.ArgumentParser(description="Log-probabilities of token ids under a model, and answers.")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; all the process may use by default")
    parser.add_argument("--gpu", type=int, action="append", default=[], help="index of a GPU to use")
    arguments = parser.parse_args()
    # What the libraries print is not the answer.
    answer_to = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    request = json.load(sys.stdin)
    settings = settings_for(request, gpu_indices=tuple(arguments.gpu), threads=arguments.threads)
    answer = asyncio.run(score(request, settings))
    answer_to.write(json.dumps(answer) + "\n")
    answer_to.flush()
    return 0


def settings_for(
    request: dict[str, Any], *, gpu_indices: tuple[int, ...] = (), threads: int | None = None
) -> EngineSettings:
    """An engine for these rows and no more: a model's whole context may need more cache than the device has."""
    config = read_config(_model_of(request))
    # vLLM scores a prompt on the way to a token after it, which needs a place in the context.
    needed = [1 + len(row) for row in request["rows"]]
    needed += [len(question["ids"]) + question["tokens_max"] for question in request["questions"]]
    wanted = EngineSettings(context_tokens_max=max([2, *needed]))
    tokens_max = context_tokens(config, wanted)
    cache_bytes = (tokens_max + _KV_CACHE_MARGIN_TOKENS) * cache_bytes_per_token(config)
    return EngineSettings(
        context_tokens_max=tokens_max,
        sequences_max=1,
        kv_cache_bytes=max(_KV_CACHE_BYTES_MIN, cache_bytes),
        gpu_memory_fraction=_GPU_MEMORY_FRACTION,
        gpu_indices=gpu_indices,
        threads=threads,
        eager=True,
        prompt_workers=0,
        # Whole weights are float32 files and held to float32 scores; on a GPU "auto" would make 16 bits of them.
        dtype="float32" if request["kind"] == "full" else "auto",
        adapters_in_batch_max=1,
        adapters_resident_max=1 if request["kind"] == "adapter" else 0,
        adapters_known_max=1,
        adapter_rank_max=max(1, int(request["rank"])),
    )


def _model_of(request: dict[str, Any]) -> Path:
    return Path(request["base_model"] if request["kind"] == "adapter" else request["export"])


async def score(request: dict[str, Any], settings: EngineSettings) -> dict[str, Any]:
    is_adapter = request["kind"] == "adapter"
    export = Path(request["export"])
    engine = cast("VllmEngine", await open_engine("vllm", _model_of(request), settings))
    await engine.start()
    try:
        if is_adapter:
            await engine.load_adapter(_ADAPTER, export, int(request["rank"]))
        length_max = engine.context_tokens_max - 1
        rows = []
        for row in request["rows"]:
            scores = await engine.score(row[:length_max], _ADAPTER if is_adapter else None)
            rows.append([*scores, *[None] * (len(row) - len(scores))])
        answers = [
            await _answer(engine, question, _ADAPTER if is_adapter else None) for question in request["questions"]
        ]
    except AdapterInvalid as error:
        return {"refused": str(error)}
    finally:
        await engine.stop()
    return {"log_probs": rows, "answers": answers}


async def _answer(engine: VllmEngine, question: dict[str, Any], adapter: str | None) -> dict[str, Any]:
    asked = GenerateRequest(
        request_id="question",
        prompt_token_ids=question["ids"],
        sampling=Sampling(temperature=0.0, completion_tokens_max=question["tokens_max"]),
        adapter_revision=adapter,
    )
    ids: list[int] = []
    stopped = False
    async with aclosing(engine.generate(asked)) as chunks:
        async for chunk in chunks:
            ids += chunk.token_ids
            stopped = chunk.finish_reason == FinishReason.STOP
    return {"ids": ids, "stopped": stopped}


if __name__ == "__main__":
    sys.exit(main())
