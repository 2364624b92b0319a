"""What a lease of credit gets: never more than is there, all that is required or nothing, and a share of the rest."""

from hypothesis import given
from hypothesis import strategies as st

from services.billing.leasing.credit_lease import Leased, Room, Wish, grown, room_of
from tests.unit.billing.test_caps import budget

amounts = st.integers(min_value=0, max_value=10**15)


wishes = st.builds(Wish, required_nanos_usd=amounts, needed_nanos_usd=amounts, wanted_nanos_usd=amounts)
shares = st.integers(2, 16)


@given(amounts, amounts, wishes, shares)
def test_a_grant_is_what_is_required_and_a_share_of_the_rest(room: int, granted: int, wish: Wish, share: int) -> None:
    total = grown(Room(nanos_usd=room), wish, granted_nanos_usd=granted, share=share)
    assert granted <= total <= granted + room
    assert (total >= wish.required_nanos_usd) == (wish.required_nanos_usd - granted <= room)
    if total > max(wish.required_nanos_usd, wish.needed_nanos_usd, granted):
        assert total <= wish.wanted_nanos_usd
        assert total - granted <= room // share


@given(st.lists(wishes, max_size=20), amounts, shares)
def test_any_number_of_leases_fit_into_what_is_there(found: list[Wish], available: int, share: int) -> None:
    leased = 0
    for wish in found:
        room = room_of(available, [], Leased(nanos_usd=leased))
        leased += grown(room, wish, granted_nanos_usd=0, share=share)
        assert leased <= available


def test_the_tightest_of_credit_and_caps_bounds_a_grant() -> None:
    project, key = budget(monthly_cap_nanos_usd=1000, spent_nanos_usd=400), budget(api_key_id="k")
    leased = Leased(nanos_usd=90, by_spender={project.spender: 80, key.spender: 30})
    assert room_of(10_000, [project], leased) == Room(nanos_usd=520, budget=project)
    assert room_of(10_000, [project, key], leased) == Room(nanos_usd=70, budget=key)
    assert room_of(150, [project, key], leased) == Room(nanos_usd=60)
    assert room_of(50, [], leased) == Room(nanos_usd=0)
