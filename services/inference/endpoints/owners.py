"""The processes that have endpoints: channels to them, and whether they are still there. Not pure: database, gRPC.

A frozen process keeps its connections open and answers nothing, but its claim runs out. It knows no message of a call.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc
import structlog

from chassis.clock import Clock
from chassis.db.pool import Pool
from chassis.errors import Unavailable
from chassis.rounds import run_rounds
from chassis.rpc.channel import open_channel
from services.inference.config import InferenceSettings
from services.inference.endpoints.domain import Endpoint
from services.inference.endpoints.store import EndpointStore
from services.inference.serving.trouble import is_passing

AGAIN_RETRY_S = 2.0
LOOKS_PER_CLAIM = 4
# The clock of the database may be set: an owner that is well has renewed its claim by the next look.
LOOKS_OVER_MAX = 2
log = structlog.get_logger()


class ServedElsewhere(Unavailable):
    """Another process has the endpoint, under this lease. A replica that may pass the call on does so."""

    def __init__(self, endpoint: Endpoint) -> None:
        message = f"endpoint {endpoint.endpoint_id} is served by another process; try again"
        super().__init__("CAPACITY_EXHAUSTED", message, retry_after_s=AGAIN_RETRY_S)
        self.endpoint = endpoint


@dataclass(kw_only=True, eq=False)
class Passed:
    """A call that was passed on. `lost` once its owner's claim is over: then it was cancelled."""

    endpoint: Endpoint
    cancel: Callable[[], object]
    looks_over: int = 0
    lost: bool = False

    def failure(self) -> Unavailable:
        message = f"the process that serves endpoint {self.endpoint.endpoint_id} does not answer any more; try again"
        return Unavailable("DEPENDENCY_UNAVAILABLE", message, retry_after_s=AGAIN_RETRY_S)


@dataclass(kw_only=True)
class _Peer:
    channel: grpc.aio.Channel
    calls: int = 0
    used_s: float = 0.0


class Owners:
    """Channels are opened on first use and closed when nobody has used them for a while."""

    def __init__(self, pool: Pool, *, settings: InferenceSettings, clock: Clock) -> None:
        self._pool = pool
        self._settings = settings
        self._clock = clock
        self._peers: dict[str, _Peer] = {}
        self._passed: dict[int, Passed] = {}
        self._numbers = itertools.count()

    async def run(self) -> None:
        """Watches the owners of calls under way until cancelled."""
        pause_s = self._settings.claim_duration_s / LOOKS_PER_CLAIM
        await run_rounds(
            "owners", self.look, wait=lambda: self._clock.sleep(pause_s), clock=self._clock, is_passing=is_passing
        )

    async def look(self) -> None:
        """Cancels the calls whose owner's claim is over, and closes channels that nobody uses."""
        if self._passed:
            asked = dict(self._passed)
            async with self._pool.acquire() as connection:
                live = await EndpointStore(connection).live_leases({call.endpoint.id for call in asked.values()})
            for call in asked.values():
                call.looks_over = 0 if call.endpoint.lease_token in live else call.looks_over + 1
                if call.looks_over >= LOOKS_OVER_MAX and not call.lost:
                    log.warning("owner_silent", endpoint=call.endpoint.id, owner=call.endpoint.owner)
                    call.lost = True
                    call.cancel()
        idle_since_s = self._clock.monotonic() - self._settings.owner_channel_idle_s_max
        for address, peer in list(self._peers.items()):
            if not peer.calls and peer.used_s < idle_since_s:
                del self._peers[address]
                await peer.channel.close()

    @contextlib.contextmanager
    def channel_to(self, endpoint: Endpoint) -> Iterator[grpc.aio.Channel]:
        """To the process that has the endpoint, for the length of a call."""
        peer = self._peers.get(endpoint.owner_address)
        if peer is None:
            channel = open_channel(self._settings, endpoint.owner_address, self._settings.service_name)
            peer = self._peers[endpoint.owner_address] = _Peer(channel=channel)
        peer.calls += 1
        try:
            yield peer.channel
        finally:
            peer.calls -= 1
            peer.used_s = self._clock.monotonic()

    @contextlib.contextmanager
    def watching(self, endpoint: Endpoint, cancel: Callable[[], object]) -> Iterator[Passed]:
        """Cancels the call when the owner of its endpoint is not heard of any more."""
        number = next(self._numbers)
        call = self._passed[number] = Passed(endpoint=endpoint, cancel=cancel)
        try:
            yield call
        finally:
            del self._passed[number]

    async def close(self) -> None:
        for peer in self._peers.values():
            await peer.channel.close()
        self._peers.clear()
