"""Limits of prompts for tests, which wait for none of them unless they say so."""

from __future__ import annotations

from services.inference.engines.prompts.renderer import PromptLimits
from services.inference.engines.prompts.workers import WorkerLimits


def limits(
    *,
    short_chars_max: int = 16_384,
    short_s_max: float = 60.0,
    long_s_max: float = 120.0,
    memory_bytes_max: int = 1 << 30,
) -> PromptLimits:
    workers = WorkerLimits(count=2, memory_bytes_max=memory_bytes_max, load_s_max=120.0)
    return PromptLimits(
        short_chars_max=short_chars_max, short_s_max=short_s_max, long_s_max=long_s_max, workers=workers
    )
