"""Which minutes are due, whatever happens: never more than was served, each once, none before it begins."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from services.inference.endpoints.minutes import ServedTime

START = datetime(2030, 1, 1, tzinfo=UTC)
SILENCE_S = 15
# (seconds that pass, what happens then, by how much the wall clock was set meanwhile)
EVENTS = st.tuples(
    st.integers(0, 40) | st.integers(0, 4000),
    st.sampled_from(("confirmed", "confirmed", "confirmed", "restarted")),
    st.sampled_from((0, 0, 0, 0, 3600, -3600)),
)


@given(st.lists(EVENTS, max_size=60))
def test_each_begun_minute_is_due_once_and_no_silence_is_billed(events: list[tuple[int, str, int]]) -> None:
    monotonic_s, set_by_s, paid_until, count, periods, served_s = 0.0, 0, None, 0, 0, 0.0
    served, confirmed_s = ServedTime(minute_s=60, silence_s_max=SILENCE_S), None
    for passed_s, what, step_s in events:
        monotonic_s += passed_s
        set_by_s += step_s
        if what == "restarted":
            served, confirmed_s = ServedTime(minute_s=60, silence_s_max=SILENCE_S), None
            continue
        if confirmed_s is None or monotonic_s - confirmed_s > SILENCE_S:
            periods += 1
        else:
            served_s += monotonic_s - confirmed_s
        confirmed_s = monotonic_s
        now = START + timedelta(seconds=monotonic_s + set_by_s)
        due = served.confirm(now, monotonic_s, paid_until)
        if due is not None:
            assert due.count >= 1
            assert paid_until is None or due.begin >= paid_until
            paid_until = due.paid_until
            count += due.count
        assert served.confirm(now, monotonic_s, paid_until) is None
    # Each period has at most one minute that was begun and not served to its end.
    assert served_s / 60 - 2 * periods <= count <= served_s / 60 + periods
    assert bool(count) == bool(periods)


@given(st.lists(st.booleans(), min_size=1, max_size=300))
def test_starting_over_again_pays_for_no_minute_twice(beats: list[bool]) -> None:
    """One second a beat; a false one is a restart. The clock is right."""
    served, paid_until, count = ServedTime(minute_s=60, silence_s_max=SILENCE_S), None, 0
    for second, lives in enumerate(beats):
        if not lives:
            served = ServedTime(minute_s=60, silence_s_max=SILENCE_S)
            continue
        due = served.confirm(START + timedelta(seconds=second), second, paid_until)
        if due is not None:
            paid_until, count = due.paid_until, count + due.count
    assert count <= (len(beats) - 1) // 60 + 1
