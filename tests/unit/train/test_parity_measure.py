"""What a scorer is held by: any token where its sums must be ours, the mean where their order or precision is
another."""

import pytest

from services.trainer.train.export.parity_report import (
    ENGINE,
    EXPORTED,
    MERGED,
    Comparison,
    held_by_mean,
    resembles_base,
)


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


@pytest.mark.parametrize(
    ("name", "tokens", "from_trained", "from_base", "lost"),
    [
        (EXPORTED, 60, 0.013, 0.004, True),
        (ENGINE, 60, 0.013, 0.004, True),
        (EXPORTED, 60, 0.004, 0.013, False),
        # A training that moved less than the noise of the sums is near both.
        (EXPORTED, 60, 0.004, 0.003, False),
        (EXPORTED, 60, 0.0, 0.0, False),
        # Too few tokens to say; float32, where any token tells; a merge, whose grid may have swallowed it.
        (EXPORTED, 15, 0.013, 0.004, False),
        (EXPORTED, 60, 0.013, None, False),
        (MERGED, 60, 0.013, 0.004, False),
    ],
)
def test_whose_scores_are_those_of_the_base(
    name: str, tokens: int, from_trained: float, from_base: float | None, lost: bool
) -> None:
    comparison = Comparison(
        tokens=tokens,
        max_abs_difference=0.05,
        mean_abs_difference=from_trained,
        mean_from_base=from_base,
        tolerance=0.1,
        first_diverging=None,
    )
    assert resembles_base(name, comparison) is lost
