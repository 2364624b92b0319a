"""Signs of life of long work: a process that says nothing for hours is taken for hung. It knows no kind of work."""

from collections.abc import Callable
from time import monotonic

from services.trainer.train.events import Emit

SAY_EVERY_S = 60.0


def sign_of_life(emit: Emit, event_type: str, total: int, done: int = 0) -> Callable[[int], None]:
    """To be called with how much more is done, of `total`; only now and then it says so."""
    said_s = monotonic()

    def tell(more: int) -> None:
        nonlocal done, said_s
        done += more
        if monotonic() - said_s >= SAY_EVERY_S:
            emit(event_type, done=min(done, total), total=total)
            said_s = monotonic()

    return tell
