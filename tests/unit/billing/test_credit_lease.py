"""What a lease of credit gets: never more than is there, all that is required or nothing, and a share of the rest."""

from hypothesis import given
from hypothesis import strategies as st

from services.billing.leasing.credit_lease import Leased, Room, grown, room_of
from tests.unit.billing.test_caps import budget

amounts = st.integers(min_value=0, max_value=10**15)


@given(amounts, amounts, amounts, amounts, st.integers(2, 16))
def test_a_grant_is_what_is_required_and_a_share_of_the_rest(
    room: int, granted: int, required: int, wanted: int, share: int
) -> None:
    total = grown(
        Room(nanos_usd=room),
        granted_nanos_usd=granted,
        required_nanos_usd=required,
        wanted_nanos_usd=wanted,
        share=share,
    )
    assert granted <= total <= granted + room
    assert (total >= required) == (required - granted <= room)
    if total > max(required, granted):
        assert total <= max(wanted, required)
        assert total - granted <= room // share


@given(st.lists(st.tuples(amounts, amounts, amounts), max_size=20), amounts, st.integers(2, 16))
def test_any_number_of_leases_fit_into_what_is_there(
    wishes: list[tuple[int, int, int]], available: int, share: int
) -> None:
    leased = 0
    for granted_before, required, wanted in wishes:
        room = room_of(available, [], Leased(nanos_usd=leased))
        before = min(granted_before, 0)
        leased += grown(
            room, granted_nanos_usd=before, required_nanos_usd=required, wanted_nanos_usd=wanted, share=share
        )
        assert leased <= available


def test_the_tightest_of_credit_and_caps_bounds_a_grant() -> None:
    project, key = budget(monthly_cap_nanos_usd=1000, spent_nanos_usd=400), budget(api_key_id="k")
    leased = Leased(nanos_usd=90, by_spender={project.spender: 80, key.spender: 30})
    assert room_of(10_000, [project], leased) == Room(nanos_usd=520, budget=project)
    assert room_of(10_000, [project, key], leased) == Room(nanos_usd=70, budget=key)
    assert room_of(150, [project, key], leased) == Room(nanos_usd=60)
    assert room_of(50, [], leased) == Room(nanos_usd=0)
