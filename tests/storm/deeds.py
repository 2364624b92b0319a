"""What the mesh acknowledged to the users of one storm, and what it said that it must never say. Plain values."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Call:
    """An answer as far as its reader had it; `whole` when the mesh said that it was over and what it used."""

    generation_id: str
    dedicated: bool
    whole: bool
    input_tokens: int
    output_tokens: int


@dataclass(kw_only=True)
class Deeds:
    """Filled by the users, read by the checker. Names are those of resources."""

    # Uploads that were acknowledged: name to SHA-256; deleted ones leave.
    files: dict[str, str] = field(default_factory=dict)
    deleted_files: set[str] = field(default_factory=set)
    # Jobs that were acknowledged: name to steps.
    jobs: dict[str, int] = field(default_factory=dict)
    # Cancellations that were acknowledged.
    cancelled: set[str] = field(default_factory=set)
    topped_up: list[int] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    # Endpoints by name: seconds from the request for one to the answer that it had stopped.
    endpoints: dict[str, float] = field(default_factory=dict)
    # What no fault excuses: untyped errors, refusals without a reason, calls that never succeeded again.
    surprises: list[str] = field(default_factory=list)
