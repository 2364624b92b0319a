"""Bounds the processor time of compiling a chat template, and of rendering one conversation by it.

The template is a stranger's and may loop for ever. The bound works in a process's main thread, where rows are rendered.
After RENDER_S_MAX the template is interrupted. What cannot be interrupted, one endless operation of Python itself, ends
the whole process by SIGPROF after twice as much; whoever started it knows by that signal.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator

from formats.prompts.faults import TEMPLATE, ModelFault

# Of a thing that takes a ten-thousandth of it. Other threads of the process count as well.
RENDER_S_MAX = 10.0

_running = False


@contextlib.contextmanager
def bounded_rendering() -> Iterator[None]:
    """Raises ModelFault in the block when it takes more. Renderings inside of a bounded block share its bound."""
    global _running
    if _running or threading.current_thread() is not threading.main_thread():
        yield
        return
    if signal.getsignal(signal.SIGVTALRM) is not _interrupt:
        signal.signal(signal.SIGVTALRM, _interrupt)
    _running = True
    signal.setitimer(signal.ITIMER_VIRTUAL, RENDER_S_MAX)
    signal.setitimer(signal.ITIMER_PROF, 2 * RENDER_S_MAX)
    try:
        yield
    except _TookTooLong:
        raise ModelFault(
            TEMPLATE,
            f"took more than {RENDER_S_MAX:g} s of a processor for one conversation "
            "and was stopped; mend the template, or leave that conversation out",
        ) from None
    finally:
        # First: a signal may have come already.
        _running = False
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)


class _TookTooLong(BaseException):
    """Nothing in between takes it for an error of the template."""


def _interrupt(number: int, frame: object) -> None:
    if _running:
        raise _TookTooLong
