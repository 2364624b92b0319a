"""Rows are dealt to processes by their lengths alone: all of them, once, evenly, always alike."""

from hypothesis import given
from hypothesis import strategies as st

from services.trainer.train.runtime.process_group import ALONE, deal, seed_of_step

LENGTHS = st.dictionaries(st.integers(0, 10_000), st.integers(2, 4096), min_size=1, max_size=60)


@given(LENGTHS, st.integers(1, 9))
def test_every_row_is_dealt_once_and_no_share_is_much_larger(lengths: dict[int, int], size: int) -> None:
    shares = deal(lengths, size)
    assert sorted(row for share in shares for row in share) == sorted(lengths)
    loads = [sum(lengths[row] for row in share) for share in shares]
    # Longest first: a share exceeds another by at most one of its rows.
    assert max(loads) - min(loads) <= max(lengths.values())
    assert shares == deal(dict(reversed(lengths.items())), size)


def test_a_row_at_least_goes_to_each_process_while_there_are_enough() -> None:
    assert deal({7: 9, 3: 9, 5: 2}, 3) == [[3], [7], [5]]
    assert deal({7: 9}, 2) == [[7], []]


def test_no_two_places_draw_the_same_dropout() -> None:
    seeds = {seed_of_step(seed, step, rank) for seed in (0, 1) for step in range(100) for rank in range(64)}
    assert len(seeds) == 2 * 100 * 64


def test_a_group_of_one_changes_nothing() -> None:
    assert ALONE.total([1.5, 2.0]) == [1.5, 2.0]
    assert (ALONE.any(True), ALONE.any(False), ALONE.leads) == (True, False, True)
