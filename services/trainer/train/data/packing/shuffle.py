"""The order in which data is seen: a pure function of seed, epoch and position.

No version of a library and no state of a generator can change it.
"""

import numpy as np
from numpy.typing import NDArray


def epoch_order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """A permutation of `range(count)`: indices sorted by a hash keyed with seed and epoch (0-based).

    A resume at any position recomputes it instead of replaying a generator.
    """
    key = _mix(_mix(np.array([seed], np.uint64)) + np.uint64(epoch + 1))
    hashes = _mix(_mix(np.arange(count, dtype=np.uint64)) ^ key)
    return np.argsort(hashes, kind="stable").astype(np.int64)


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: every input bit reaches every output bit; wraps modulo 2**64."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
