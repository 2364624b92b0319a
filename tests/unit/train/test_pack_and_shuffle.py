"""Packing loses nothing and overflows nowhere; the order is a pure function; the plan's parts fit together."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.trainer.train.data.packing.pack import pack
from services.trainer.train.data.packing.shuffle import epoch_order
from services.trainer.train.data.schedule import schedule_run


@given(st.lists(st.integers(1, 64), max_size=200))
def test_every_row_is_packed_once_within_the_limit_and_always_the_same_way(lengths: list[int]) -> None:
    sequences = list(pack(np.array(lengths, np.int64), 64))
    assert sorted(row for sequence in sequences for row in sequence) == list(range(len(lengths)))
    fills = [sum(lengths[row] for row in sequence) for sequence in sequences]
    assert all(0 < fill <= 64 for fill in fills)
    assert sequences == list(pack(np.array(lengths, np.int64), 64))
    # Best fit never opens a sequence while two half-empty ones could be one.
    assert sum(fill <= 32 for fill in fills) <= 1


def test_packing_takes_the_tightest_fit() -> None:
    assert list(pack(np.array([6, 5, 4, 3, 2]), 10)) == [(0, 2), (1, 3, 4)]


@pytest.mark.parametrize("lengths", [[0], [11]])
def test_a_row_that_fits_nowhere_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="sequences take 1 to 10"):
        pack(np.array(lengths), 10)


@given(st.integers(0, 2**32 - 1), st.integers(0, 99), st.integers(0, 300))
def test_the_order_is_a_permutation_and_pure(seed: int, epoch: int, count: int) -> None:
    order = epoch_order(seed, epoch, count)
    assert sorted(order.tolist()) == list(range(count))
    assert np.array_equal(order, epoch_order(seed, epoch, count))


def test_the_order_never_changes_from_version_to_version() -> None:
    assert epoch_order(42, 0, 8).tolist() == [2, 0, 7, 6, 3, 1, 4, 5]
    assert epoch_order(42, 1, 8).tolist() != epoch_order(42, 0, 8).tolist()
    assert epoch_order(43, 0, 8).tolist() != epoch_order(42, 0, 8).tolist()


@given(
    count=st.integers(1, 500),
    per_step=st.integers(1, 64),
    epochs=st.integers(1, 5),
    evaluations=st.integers(0, 12),
    checkpoints=st.integers(1, 10),
    every=st.none() | st.integers(1, 50),
)
def test_a_plan_covers_the_run(
    count: int, per_step: int, epochs: int, evaluations: int, checkpoints: int, every: int | None
) -> None:
    plan = schedule_run(
        count,
        sequences_per_step=per_step,
        epochs=epochs,
        evaluations=evaluations,
        checkpoints=checkpoints,
        checkpoint_every_steps=every,
        seed=3,
    )
    for epoch in range(epochs):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        seen = [index for step in steps for index in plan.sequences_of_step(step, count).tolist()]
        assert sorted(seen) == list(range(count))
    # Each evaluation happens, in order, inside the run; the last one of an epoch at its end.
    assert [number for number, _ in plan.evaluations] == list(range(1, epochs * evaluations + 1))
    steps_of = [step for _, step in plan.evaluations]
    assert steps_of == sorted(steps_of)
    assert all(1 <= step <= plan.total_steps for step in steps_of)
    if evaluations:
        assert steps_of[-1] == plan.total_steps
    # Reports end at every checkpoint, so no metered range ever straddles a point of resume.
    assert plan.reports[-1] == plan.total_steps
    assert list(plan.reports) == sorted(set(plan.reports))
    assert set(plan.checkpoints) <= plan.report_set
    assert plan.checkpoints[plan.total_steps] is True
    assert all(1 <= step <= plan.total_steps for step in plan.checkpoints)
    assert sum(plan.checkpoints.values()) <= checkpoints
