"""Which connection gives way: the one that has waited longest, and none that has asked something."""

from typing import Any

import pytest

from chassis.clock import ManualClock
from chassis.errors import Unavailable
from services.gateway.config import GatewaySettings
from services.gateway.http.sockets import Sockets


class Connection:
    given_up = False

    def give_up(self) -> None:
        self.given_up = True


def sockets_of(**values: Any) -> Sockets:
    return Sockets(GatewaySettings(http_header_s_max=1000, **values), ManualClock())


async def test_the_one_that_waits_longest_gives_way() -> None:
    sockets = sockets_of(http_sockets_max=3)
    asked, answered, silent, late = (Connection() for _ in range(4))
    for connection in (asked, answered, silent):
        sockets.open(connection, "a")
    sockets.begin(asked)
    sockets.begin(answered)
    sockets.wait(answered)
    sockets.open(late, "a")
    assert [connection.given_up for connection in (asked, answered, silent, late)] == [False, False, True, False]


async def test_where_all_have_asked_the_next_is_refused_until_one_leaves() -> None:
    sockets = sockets_of(http_sockets_max=1)
    asked = Connection()
    sockets.open(asked, "a")
    sockets.begin(asked)
    with pytest.raises(Unavailable) as told:
        sockets.open(Connection(), "b")
    assert told.value.metadata == {"limit": "http_sockets_max", "limit_count": "1"}
    sockets.close(asked)
    sockets.open(Connection(), "b")
    assert not asked.given_up


async def test_an_address_has_a_part_of_them_where_that_is_set() -> None:
    sockets = sockets_of(http_sockets_per_address_max=1)
    first = Connection()
    sockets.open(first, "a")
    with pytest.raises(Unavailable) as told:
        sockets.open(Connection(), "a")
    assert told.value.metadata["limit"] == "http_sockets_per_address_max"
    sockets.open(Connection(), "b")
    sockets.close(first)
    sockets.open(Connection(), "a")
