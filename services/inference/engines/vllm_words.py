"""Between this product's words for limits, errors and tokens, and vLLM's. Not pure: vllm.

It knows no engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.exceptions import VLLMClientError

from services.inference.engines.answer_chunks import FinishReason, TokenLogprob
from services.inference.engines.answers.answer_reading import ReadingLimits
from services.inference.engines.base import EngineFailed, EngineSettings, RequestInvalid
from services.inference.engines.prompts.renderer import PromptLimits
from services.inference.engines.prompts.workers import WorkerLimits

# The names that callers know, for those of vLLM's that differ.
_PARAMETERS = {"stop_token_ids": "stop", "logprobs": "top_logprobs", "structured_outputs": "response_format"}


def prompt_limits(settings: EngineSettings) -> PromptLimits:
    """What rendering a prompt may take."""
    return PromptLimits(
        short_chars_max=settings.prompt_chars_short_max,
        short_s_max=settings.prompt_s_max,
        long_s_max=settings.long_prompt_s_max,
        workers=WorkerLimits(
            count=settings.prompt_workers,
            memory_bytes_max=settings.prompt_memory_bytes_max,
            load_s_max=settings.start_timeout_s,
        ),
    )


def reading_limits(settings: EngineSettings) -> ReadingLimits:
    """What reading an answer may take."""
    return ReadingLimits(
        part_s_max=settings.answer_part_s_max,
        answer_s_max=settings.answer_s_max,
        form_s_max=settings.guide_s_max,
        memory_bytes_max=settings.prompt_memory_bytes_max,
        load_s_max=settings.start_timeout_s,
    )


def logprob_of(chosen: int, ranked: dict[int, Any], texts: Mapping[int, str]) -> TokenLogprob:
    """A chosen token with the most likely ones at its place, as many as were asked for."""
    # vLLM adds the chosen token to the most likely ones; it stays among them only where its rank says so.
    size = len(ranked) if ranked[chosen].rank <= len(ranked) - 1 else len(ranked) - 1
    best = sorted(ranked.items(), key=lambda item: item[1].rank)[:size] if size else []
    return TokenLogprob(
        token_id=chosen,
        text=texts[chosen],
        logprob=ranked[chosen].logprob,
        alternatives=tuple(
            TokenLogprob(token_id=token_id, text=texts[token_id], logprob=entry.logprob) for token_id, entry in best
        ),
    )


def invalid_of(error: VLLMClientError) -> RequestInvalid:
    """What vLLM refuses, by the name that callers have for it."""
    parameter = getattr(error, "parameter", None) or "request"
    return RequestInvalid(_PARAMETERS.get(parameter, parameter), str(error.args[0] if error.args else error))


def finish_reason_of(reason: str | None) -> FinishReason | None:
    """Why vLLM ended an answer; EngineFailed when nobody asked it to."""
    if reason is None:
        return None
    if reason in (FinishReason.STOP, FinishReason.LENGTH):
        return FinishReason(reason)
    raise EngineFailed(f"vLLM ended the request by itself: {reason}")
