"""Keeps the memory of a process small that moves large blocks between threads. Not pure: the C library.

The allocator gives each thread a heap of its own and keeps what is freed there. Blocks of uploads pass through many
threads, so that what one has freed would be allocated again in the next.
"""

import ctypes

_M_ARENA_MAX = -8


def share_heaps(heaps_max: int) -> None:
    """At most so many heaps, for threads that begin from now on; nothing where the C library has no such thing."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_M_ARENA_MAX, heaps_max)
