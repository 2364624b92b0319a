"""What a call uses: counted while it runs, and cut into parts, each of which billing books once."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, kw_only=True)
class MeteredCall:
    """Whose tokens one generation uses, and whose price applies."""

    generation_id: str
    project_id: str
    organization_id: str
    model_id: str
    base_model: str
    # The key that called; empty where there is none.
    api_key_id: str = ""
    # The lease of credit that the call is reserved from; empty where it is paid otherwise.
    credit_lease_id: str = ""


@dataclass(frozen=True, kw_only=True)
class UsagePart:
    """The generated tokens from `start` up to `end` of a call. The prompt's tokens are in the first part."""

    call: MeteredCall
    start: int
    end: int
    input_tokens: int
    used_at: datetime

    @property
    def work_key(self) -> str:
        """Names the work, so that it is booked once however often it is told."""
        return f"{self.call.generation_id}:{self.start}-{self.end}"


class CallUse:
    """Counts one call. What is in a part is never in another one."""

    def __init__(self, call: MeteredCall) -> None:
        self.call = call
        self._input_tokens = self._output_tokens = 0
        self._input_cut = self._output_cut = 0

    def count(self, input_tokens: int, output_tokens: int) -> None:
        """What the call used until now, all together."""
        assert input_tokens >= self._input_tokens and output_tokens >= self._output_tokens
        self._input_tokens, self._output_tokens = input_tokens, output_tokens

    def cut(self, now: datetime) -> UsagePart | None:
        """The part since the last cut; None when nothing was used since."""
        if (self._input_tokens, self._output_tokens) == (self._input_cut, self._output_cut):
            return None
        part = UsagePart(
            call=self.call,
            start=self._output_cut,
            end=self._output_tokens,
            input_tokens=self._input_tokens - self._input_cut,
            used_at=now,
        )
        self._input_cut, self._output_cut = self._input_tokens, self._output_tokens
        return part
