"""The token bucket: what it lets through, what it asks to wait, and that it forgets."""

from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.identity.rate_limit import RateLimiter


def test_a_burst_passes_and_then_the_rate_rules():
    limiter = RateLimiter(rate_per_s=10, burst=3, keys_max=10)
    assert [limiter.take("key", 0.0) for _ in range(3)] == [0, 0, 0]
    assert limiter.take("key", 0.0) == 0.1
    assert limiter.take("key", 0.05) > 0
    assert limiter.take("key", 0.1) == 0
    assert limiter.take("other", 0.1) == 0


def test_waiting_as_asked_is_enough():
    limiter = RateLimiter(rate_per_s=7, burst=1, keys_max=10)
    assert limiter.take("key", 0.0) == 0
    wait_s = limiter.take("key", 0.0)
    assert limiter.take("key", wait_s + 1e-9) == 0


def test_the_quietest_key_is_forgotten_first():
    limiter = RateLimiter(rate_per_s=1, burst=1, keys_max=2)
    for key in ("a", "b", "c"):
        assert limiter.take(key, 0.0) == 0
    assert limiter.take("c", 0.0) > 0
    assert limiter.take("b", 0.0) > 0
    assert limiter.take("a", 0.0) == 0


@given(st.lists(st.floats(0, 1, allow_nan=False), max_size=200))
@settings(deadline=None)
def test_never_more_than_burst_and_rate_allow(pauses):
    limiter = RateLimiter(rate_per_s=5, burst=4, keys_max=1)
    now_s, passed = 0.0, 0
    for pause_s in pauses:
        now_s += pause_s
        passed += limiter.take("key", now_s) == 0
        assert passed <= 4 + 5 * now_s + 1e-6
