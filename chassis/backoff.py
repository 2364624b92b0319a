"""Growing waits between retries, with jitter. It knows nothing about what is retried."""

import random


class Backoff:
    """Doubles from `first_s` to at most `last_s`; each wait is drawn between half of the step and the whole of it.

    The jitter keeps many processes that lost the same server from returning in one wave.
    """

    def __init__(self, *, first_s: float, last_s: float, source: random.Random | None = None) -> None:
        assert 0 < first_s <= last_s
        self._first_s = first_s
        self._last_s = last_s
        self._step_s = first_s
        self._source = source or random.Random()  # noqa: S311 - spreading retries is no secret

    def next_s(self) -> float:
        step_s = self._step_s
        self._step_s = min(step_s * 2, self._last_s)
        return step_s * self._source.uniform(0.5, 1.0)

    def reset(self) -> None:
        self._step_s = self._first_s
