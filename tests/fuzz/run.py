"""How long the fuzz runs and from which seed: `FINEMESH_FUZZ_EXAMPLES` of each case, `FINEMESH_FUZZ_SEED`."""

import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, seed, settings

# Without a seed the examples are the same at every run, so that a run of all tests finds nothing by chance.
EXAMPLES = int(os.environ.get("FINEMESH_FUZZ_EXAMPLES") or 10)
SEED = os.environ.get("FINEMESH_FUZZ_SEED")


def fuzzed(share: float = 1.0) -> Callable[[Any], Any]:
    """`share` is how many examples of those this test takes: more where one costs little."""
    told = settings(
        max_examples=max(1, int(EXAMPLES * share)),
        derandomize=SEED is None,
        database=None,
        deadline=None,
        print_blob=True,
        # A finding is made small in the long run only: a test that fails in a run of all tests has to end.
        phases=[Phase.explicit, Phase.generate, *([] if SEED is None else [Phase.shrink])],
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: told(test if SEED is None else seed(int(SEED))(test))
