"""What one call used, and for whom."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, kw_only=True)
class UsageOfCall:
    """Tokens that one generation used, and for whom."""

    generation_id: str
    project_id: str
    organization_id: str
    model_id: str
    base_model: str
    input_tokens: int
    output_tokens: int
    ended_at: datetime
    # The key that called; empty where there is none.
    api_key_id: str = ""
