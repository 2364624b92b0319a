"""Repeats a call that is safe to repeat, with jittered pauses, while the deadline has room for it.

It does not know whether a call is safe to repeat: only its caller does.
"""

import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from chassis.backoff import Backoff
from chassis.clock import Clock
from chassis.errors import DeadlineExceeded, Unavailable
from chassis.rpc import deadline

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

    The pauses grow with jitter from `base_s` to at most `cap_s`, but are never shorter than what the server asked for
    with `retry_after_s`. Other errors pass at once.
    """
    backoff = Backoff(first_s=base_s, last_s=cap_s, source=rng)
    for _ in range(attempts - 1):
        try:
            return await call()
        except (Unavailable, DeadlineExceeded) as error:
            pause_s = max(backoff.next_s(), error.retry_after_s or 0.0)
            remaining_s = deadline.remaining_s()
            if remaining_s is not None and remaining_s <= pause_s:
                raise
        await clock.sleep(pause_s)
    return await call()
