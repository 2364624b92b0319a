"""What a scorer is held by: any token where its sums must be ours, the mean where their order or precision is another."""

import pytest

from services.trainer.train.parity import ENGINE, EXPORTED, MERGED, held_by_mean


@pytest.mark.parametrize(
    ("name", "exact", "on_gpu", "own_kernels", "by_mean"),
    [
        (EXPORTED, True, True, True, False),
        (MERGED, True, True, True, False),
        (EXPORTED, False, True, False, False),
        (EXPORTED, False, True, True, True),
        (MERGED, False, True, False, True),
        (ENGINE, True, False, False, False),
        # vLLM's attention there multiplies float32 as TF32, whatever it is asked for.
        (ENGINE, True, True, False, True),
        (ENGINE, False, True, False, True),
    ],
)
def test_what_a_scorer_is_held_by(name: str, exact: bool, on_gpu: bool, own_kernels: bool, by_mean: bool) -> None:
    assert held_by_mean(name, exact=exact, on_gpu=on_gpu, own_kernels=own_kernels) is by_mean
