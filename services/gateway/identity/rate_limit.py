"""A token bucket per key. The time is passed in; it knows neither calls nor errors."""

from collections import OrderedDict


class RateLimiter:
    """`rate_per_s` calls are allowed on average, `burst` at once, for each of at most `keys_max` keys.

    The key that was quiet longest is forgotten first; its bucket would be full again anyway in all but an attack.
    """

    def __init__(self, *, rate_per_s: float, burst: int, keys_max: int) -> None:
        assert rate_per_s > 0 and burst >= 1 and keys_max >= 1
        self._rate_per_s = rate_per_s
        self._burst = float(burst)
        self._keys_max = keys_max
        # key -> (tokens left, monotonic seconds of that count)
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, key: str, now_s: float) -> float:
        """Takes one token and returns 0, or takes nothing and returns the seconds after which one is there."""
        tokens, counted_s = self._buckets.get(key, (self._burst, now_s))
        tokens = min(self._burst, tokens + max(0.0, now_s - counted_s) * self._rate_per_s)
        allowed = tokens >= 1.0
        self._buckets[key] = (tokens - 1.0 if allowed else tokens, now_s)
        self._buckets.move_to_end(key)
        if len(self._buckets) > self._keys_max:
            self._buckets.popitem(last=False)
        return 0.0 if allowed else (1.0 - tokens) / self._rate_per_s
