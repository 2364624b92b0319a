"""How many quotes and previews of one API key wait for their analysis at the same time. It knows no dataset.

Each replica counts its own, in memory: what it counts ends with its calls.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from chassis.errors import ResourceExhausted
from chassis.identity import Caller

_RETRY_AFTER_S = 1.0


class QuotesInLine:
    def __init__(self, per_key_max: int) -> None:
        self._per_key_max = per_key_max
        self._of_key: Counter[tuple[str, str]] = Counter()

    @contextmanager
    def place(self, caller: Caller) -> Iterator[None]:
        """One place meanwhile; ResourceExhausted when the key has as many as it gets."""
        key = (caller.account, caller.subject)
        if self._of_key[key] >= self._per_key_max:
            raise ResourceExhausted(
                "RATE_LIMITED",
                f"{self._per_key_max} quotes and previews of this API key wait for their analysis already "
                "(quotes_per_key_max); wait for one of them or cancel it, then ask again",
                metadata={"limit": "quotes_per_key_max", "limit_value": str(self._per_key_max)},
                retry_after_s=_RETRY_AFTER_S,
            )
        self._of_key[key] += 1
        try:
            yield
        finally:
            self._of_key[key] -= 1
            if not self._of_key[key]:
                del self._of_key[key]
