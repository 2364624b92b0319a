"""The parts of a call follow each other without overlap, and add up to what was counted."""

from __future__ import annotations

from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from services.inference.metering.domain import CallUse, MeteredCall

NOW = datetime(2030, 1, 1, tzinfo=UTC)
CALL = MeteredCall(generation_id="gen-1", project_id="p", organization_id="o", model_id="m", base_model="b")


@given(st.lists(st.tuples(st.integers(0, 50), st.booleans())), st.integers(1, 100))
def test_parts_add_up_whenever_they_are_cut(steps: list[tuple[int, bool]], prompt: int) -> None:
    use, parts, written = CallUse(CALL), [], 0
    for tokens, cut in steps:
        written += tokens
        use.count(prompt, written)
        if cut and (part := use.cut(NOW)) is not None:
            parts.append(part)
    if (part := use.cut(NOW)) is not None:
        parts.append(part)
    assert use.cut(NOW) is None
    assert sum(part.end - part.start for part in parts) == written
    assert sum(part.input_tokens for part in parts) == (prompt if steps else 0)
    assert [part.start for part in parts] == [0, *(part.end for part in parts)][: len(parts)]
    assert len({part.work_key for part in parts}) == len(parts)


def test_a_part_is_named_after_its_tokens() -> None:
    use = CallUse(CALL)
    use.count(7, 0)
    first = use.cut(NOW)
    use.count(7, 128)
    second = use.cut(NOW)
    assert first is not None and second is not None
    assert (first.work_key, first.input_tokens) == ("gen-1:0-0", 7)
    assert (second.work_key, second.input_tokens) == ("gen-1:0-128", 0)
