"""Repeats a call that is safe to repeat, with jittered pauses, while the deadline has room for it.

It does not know whether a call is safe to repeat: only its caller does.
"""

import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from chassis import deadline
from chassis.clock import Clock
from chassis.errors import DeadlineExceeded, DomainError, Unavailable

_T = TypeVar("_T")


async def retry(
    call: Callable[[], Awaitable[_T]],
    *,
    clock: Clock,
    attempts: int = 4,
    base_s: float = 0.1,
    cap_s: float = 5.0,
    rng: random.Random | None = None,
) -> _T:
    """The first answer of `call`, or its last error after `attempts` times Unavailable or DeadlineExceeded.

    The pause before attempt n is random below `base_s * 2**n` and at most `cap_s`, but never shorter than what the
    server asked for with `retry_after_s`. Other errors pass at once.
    """
    chance = rng or random.Random()  # noqa: S311 - spreads load, guards nothing
    for attempt in range(attempts - 1):
        try:
            return await call()
        except (Unavailable, DeadlineExceeded) as error:
            pause_s = _pause_s(error, attempt, base_s, cap_s, chance)
            remaining_s = deadline.remaining_s()
            if remaining_s is not None and remaining_s <= pause_s:
                raise
        await clock.sleep(pause_s)
    return await call()


def _pause_s(error: DomainError, attempt: int, base_s: float, cap_s: float, chance: random.Random) -> float:
    pause_s = chance.uniform(0, min(cap_s, base_s * 2**attempt))
    return max(pause_s, error.retry_after_s or 0.0)
