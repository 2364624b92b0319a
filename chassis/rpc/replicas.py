"""Several addresses of one service as one: each call goes to a replica that is connected. It knows no method.

Replicas share what they know, so that any of them will do. A connection that a frozen peer holds open is not taken for
one: gRPC's keepalive ends it, and it then counts as not connected until a handshake succeeds.
"""

from collections.abc import Sequence

import grpc

_READY = grpc.ChannelConnectivity.READY
# What a call waits for at most is the sooner over the further left it stands.
_BY_HOPE = (_READY, grpc.ChannelConnectivity.IDLE, grpc.ChannelConnectivity.CONNECTING)


def split_addresses(addresses: str) -> list[str]:
    """Of a setting that names several with commas between."""
    return [address for address in map(str.strip, addresses.split(",")) if address]


class Replicas:
    """A channel for each address; at least one."""

    def __init__(self, channels: Sequence[grpc.aio.Channel]) -> None:
        assert channels
        self.channels = tuple(channels)
        self._calls = 0

    def pick(self) -> int:
        """The index for the next call: those that are connected take turns; while none is, the most hopeful ones."""
        count = len(self.channels)
        if count == 1:
            return 0
        self._calls += 1
        # Those that lost their connection seek a new one meanwhile.
        states = [channel.get_state(try_to_connect=True) for channel in self.channels]
        turns = [(self._calls + offset) % count for offset in range(count)]
        for hope in _BY_HOPE:
            for index in turns:
                if states[index] is hope:
                    return index
        return turns[0]

    async def close(self, grace: float | None = None) -> None:
        for channel in self.channels:
            await channel.close(grace)
