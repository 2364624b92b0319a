"""The policy on thousands of made-up fleets and queues: nobody shares, nobody starves, nobody gets half a gang."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.placement.policy import (
    DeviceGroup,
    Need,
    Placement,
    Placing,
    choose,
    estimated_wait_s,
    memory_bytes_min,
    place,
    too_large,
    waiting_for,
)


def group(
    node: str, size: int, free: int, *, kind: str = "h100", memory_bytes: int = 0, ready: bool = True
) -> DeviceGroup:
    return DeviceGroup(
        node=node,
        hardware_type=kind,
        memory_bytes=memory_bytes,
        indices=frozenset(range(size)),
        free=frozenset(range(free)),
        ready=ready,
    )


@st.composite
def fleets(draw: st.DrawFn) -> list[DeviceGroup]:
    groups = []
    for number in range(draw(st.integers(0, 5))):
        size = draw(st.integers(1, 8))
        free = draw(st.integers(0, size))
        groups.append(
            group(
                f"node-{number}",
                size,
                free,
                kind=draw(st.sampled_from(["a", "b"])),
                memory_bytes=draw(st.sampled_from([0, 10, 80])),
                ready=draw(st.booleans()),
            )
        )
    return groups


queues = st.lists(
    st.builds(
        lambda count, memory, kind: (count, memory, kind),
        st.integers(1, 8),
        st.sampled_from([0, 15, 100]),
        st.sampled_from(["", "a", "b"]),
    ),
    max_size=12,
).map(
    lambda needs: [
        Need(owner=f"job-{number}", count=count, memory_bytes_min=memory, hardware_type=kind)
        for number, (count, memory, kind) in enumerate(needs)
    ]
)


@given(queues, fleets())
def test_whole_gangs_on_free_devices_of_one_ready_node(queue: list[Need], fleet: list[DeviceGroup]) -> None:
    by_key = {(each.node, each.hardware_type): each for each in fleet}
    needs = {need.owner: need for need in queue}
    taken: set[tuple[str, str, int]] = set()
    for placement in place(queue, fleet):
        where = by_key[(placement.node, placement.hardware_type)]
        need = needs[placement.owner]
        assert where.ready
        assert where.could_fit(need)
        assert len(placement.device_indices) == need.count
        assert set(placement.device_indices) <= where.free
        devices = {(placement.node, placement.hardware_type, index) for index in placement.device_indices}
        assert not devices & taken
        taken |= devices


@given(queues, fleets())
def test_a_later_job_never_takes_what_an_earlier_one_waits_for(queue: list[Need], fleet: list[DeviceGroup]) -> None:
    placed = {placement.owner: placement for placement in place(queue, fleet)}
    by_key = {(each.node, each.hardware_type): each for each in fleet}
    for number, waiting in enumerate(queue):
        if waiting.owner in placed:
            continue
        for later in queue[number + 1 :]:
            if later.owner in placed:
                spot = placed[later.owner]
                assert not by_key[(spot.node, spot.hardware_type)].could_fit(waiting)


@given(queues, fleets())
def test_the_first_that_fits_is_placed(queue: list[Need], fleet: list[DeviceGroup]) -> None:
    if queue and choose(queue[0], fleet) is not None:
        assert place(queue, fleet)[0].owner == queue[0].owner


@given(queues, fleets())
def test_the_same_snapshot_gives_the_same_answer(queue: list[Need], fleet: list[DeviceGroup]) -> None:
    assert place(queue, fleet) == place(queue, list(reversed(fleet)))


def test_small_jobs_pass_only_where_the_large_one_never_fits() -> None:
    queue = [Need(owner="large", count=4), Need(owner="small", count=1)]
    assert place(queue, [group("big", 4, 3)]) == []
    (placement,) = place(queue, [group("big", 4, 3), group("tiny", 1, 1)])
    assert (placement.owner, placement.node) == ("small", "tiny")


def test_the_tightest_node_is_taken() -> None:
    chosen = choose(Need(owner="j", count=2), [group("wide", 8, 8), group("tight", 4, 2)])
    assert chosen is not None
    assert chosen.node == "tight"


def test_too_large_only_when_no_registered_node_could_ever_fit() -> None:
    need = Need(owner="j", count=4)
    assert too_large(need, []) is None
    assert too_large(need, [group("busy", 4, 0), group("small", 1, 1)]) is None
    assert too_large(need, [group("away", 4, 4, ready=False)]) is None
    problem = too_large(need, [group("a", 2, 2), group("b", 1, 1)])
    assert problem is not None
    assert problem.requested == "4 GPUs on one node"
    assert problem.largest == "2 of type h100 (a)"


def test_what_no_node_can_hold_is_spread_in_equal_parts_over_as_few_as_there_can_be() -> None:
    fleet = [group("a", 2, 2), group("b", 2, 2), group("c", 4, 4), group("d", 8, 8, kind="other")]
    (placement,) = place([Need(owner="j", count=4, nodes_max=8)], fleet[:3])
    assert (placement.node, placement.followers) == ("c", ())
    (placement,) = place([Need(owner="j", count=4, nodes_max=8)], fleet[:2])
    parts = (placement, *placement.followers)
    assert [(part.node, part.device_indices) for part in parts] == [("a", (0, 1)), ("b", (0, 1))]
    assert {part.owner for part in parts} == {"j"}
    # Not over types, not in unequal parts, not over more nodes than it may have.
    assert place([Need(owner="j", count=10, nodes_max=8)], fleet) == []
    assert place([Need(owner="j", count=3, nodes_max=8)], fleet[:2]) == []
    assert place([Need(owner="j", count=6, nodes_max=2)], fleet[:3]) == []
    assert too_large(Need(owner="j", count=6, nodes_max=2), fleet[:3]) is not None
    assert too_large(Need(owner="j", count=6, nodes_max=3), fleet[:3]) is None


def test_a_gang_waits_whole_and_keeps_its_nodes() -> None:
    queue = [Need(owner="gang", count=4, nodes_max=2), Need(owner="small", count=1, nodes_max=2)]
    fleet = [group("a", 2, 2), group("b", 2, 1)]
    assert place(queue, fleet) == []
    words = waiting_for(queue[0], fleet, 1)
    assert words == "2 GPUs on one node, on 2 nodes at the same time; 2 of 2 free on a"
    (placement,) = place(queue, [*fleet, group("tiny", 1, 1)])
    assert (placement.owner, placement.node) == ("small", "tiny")


@given(queues, fleets())
def test_gangs_over_nodes_share_nothing_and_are_whole(queue: list[Need], fleet: list[DeviceGroup]) -> None:
    by_key = {(each.node, each.hardware_type): each for each in fleet}
    needs = {need.owner: replace(need, nodes_max=4) for need in queue}
    taken: set[tuple[str, str, int]] = set()
    for placement in place(list(needs.values()), fleet):
        parts = (placement, *placement.followers)
        assert len({part.node for part in parts}) == len(parts)
        assert len({part.hardware_type for part in parts}) == 1
        assert sum(len(part.device_indices) for part in parts) == needs[placement.owner].count
        for part in parts:
            where = by_key[(part.node, part.hardware_type)]
            assert where.ready
            assert set(part.device_indices) <= where.free
            devices = {(part.node, part.hardware_type, index) for index in part.device_indices}
            assert not devices & taken
            taken |= devices


def test_memory_counts_as_far_as_it_is_known() -> None:
    need = Need(owner="j", count=1, memory_bytes_min=memory_bytes_min(8_000_000_000, all_weights=True))
    assert too_large(need, [group("small", 1, 1, memory_bytes=80 * 2**30)]) is not None
    assert too_large(need, [group("unknown", 1, 1)]) is None
    assert too_large(need, [group("large", 1, 1, memory_bytes=141 * 2**30)]) is None
    both = Need(owner="j", count=2, memory_bytes_min=memory_bytes_min(8_000_000_000, all_weights=True))
    assert too_large(both, [group("pair", 2, 2, memory_bytes=80 * 2**30)]) is None


def test_why_it_waits() -> None:
    need = Need(owner="j", count=1)
    assert waiting_for(need, [], 1) == "1 GPU on one node; no node is registered"
    assert waiting_for(need, [group("n", 1, 0)], 1) == "1 GPU on one node; 0 of 1 free on n"
    assert "away" in waiting_for(need, [group("n", 1, 1, ready=False)], 1)
    assert "kept for a job before it" in waiting_for(need, [group("n", 2, 1)], 2)
    assert "no registered node is that large" in waiting_for(Need(owner="j", count=9), [group("n", 1, 1)], 1)


def test_the_estimate_is_when_enough_others_have_ended() -> None:
    assert estimated_wait_s(1, []) is None
    assert estimated_wait_s(1, [30.4, 10.2]) == 10
    assert estimated_wait_s(2, [30.4, 10.2]) == 30
    assert estimated_wait_s(3, [30.4, 10.2]) is None


@given(fleets(), queues, st.integers(1, 4))
def test_a_queue_that_is_read_in_parts_is_placed_as_if_it_were_read_whole(
    fleet: list[DeviceGroup], queue: list[Need], part: int
) -> None:
    placing = Placing(fleet)
    parts = [
        placement for start in range(0, len(queue), part) for placement in placing.add(queue[start : start + part])
    ]
    assert parts == place(queue, fleet)
    assert {device for placement in parts for device in devices_of(placement)} <= {
        (each.node, index) for each in fleet for index in each.free
    }
    if not placing.has_room:
        assert placing.add([Need(owner="late", count=1)]) == []


def devices_of(placement: Placement) -> list[tuple[str, int]]:
    """Of all nodes of a placement."""
    parts = (placement, *placement.followers)
    return [(part.node, index) for part in parts for index in part.device_indices]
