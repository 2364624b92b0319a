"""Which replica of the scheduler an agent turns to."""

from services.trainer.agent.scheduler_link import next_target, resolve


def test_replicas_are_taken_in_turn_and_nodes_begin_at_different_ones() -> None:
    targets = ["a:1", "b:1", "c:1"]
    assert [next_target(targets, present, first=0) for present in ("", "a:1", "b:1", "c:1")] == [*targets, "a:1"]
    assert next_target(targets, "", first=4) == "b:1"
    # It is not among them any more.
    assert next_target(targets, "gone:1", first=2) == "c:1"
    assert next_target(["a:1"], "a:1", first=7) == "a:1"


async def test_a_list_of_addresses_is_looked_up_and_an_unknown_name_is_kept() -> None:
    found = await resolve("127.0.0.1:1, 127.0.0.2:2,127.0.0.1:1,no-such-host.invalid:3", 5)
    assert found == ["127.0.0.1:1", "127.0.0.2:2", "no-such-host.invalid:3"]
