"""The connection to the scheduler: to one of its replicas at a time. Not pure: gRPC, DNS.

Replicas share one database, so that any of them will do. A replica that froze still holds its connections open. So
`renew` opens a new one, to another replica if there is one, under addresses that are looked up again. It knows neither
what is said nor when a replica counts as silent.
"""

import asyncio
import socket
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import grpc
import structlog

from chassis.rpc.channel import open_channel
from chassis.rpc.replicas import split_addresses
from finemesh.nodes.v1 import node_service_pb2_grpc
from services.trainer.config import TrainerSettings

if TYPE_CHECKING:
    _Stub = node_service_pb2_grpc.NodeServiceAsyncStub

log = structlog.get_logger()

# Beyond the longest deadline of a call: a channel that closes earlier would cancel the tasks that wait for its calls.
_CLOSING_SLACK_S = 5.0


class SchedulerLink:
    """`renew` before the first call; `stub` may be kept, since its calls go to the replica of the moment."""

    def __init__(self, settings: TrainerSettings) -> None:
        self._settings = settings
        self._target = ""
        self._channel: grpc.aio.Channel | None = None
        self._current: Any = None
        self._closing: set[asyncio.Task[None]] = set()
        self.stub = cast("_Stub", _CurrentStub(self))

    @property
    def current(self) -> Any:
        assert self._current is not None, "renew comes first"
        return self._current

    async def renew(self) -> None:
        """A new connection, to the replica after the present one; calls under way on the old one go on."""
        targets = await resolve(self._settings.scheduler_agents_address, self._settings.connect_timeout_s)
        self._target = next_target(targets, self._target, first=zlib.crc32(self._settings.node_name.encode()))
        before, self._channel = self._channel, open_channel(self._settings, self._target, "scheduler")
        self._current = node_service_pb2_grpc.NodeServiceStub(self._channel)
        log.info("scheduler_link_opened", target=self._target, replicas=len(targets))
        if before is not None:
            grace_s = max(self._settings.report_timeout_s, self._settings.default_deadline_s) + _CLOSING_SLACK_S
            closing = asyncio.create_task(before.close(grace_s))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        for closing in self._closing:
            closing.cancel()
        if self._channel is not None:
            await self._channel.close()


class _CurrentStub:
    def __init__(self, link: SchedulerLink) -> None:
        self._link = link

    def __getattr__(self, method: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            return getattr(self._link.current, method)(*arguments, **options)

        return call


async def resolve(addresses: str, timeout_s: float) -> list[str]:
    """Every host:port behind a list of them with commas between; a name that nobody knows now stays as it is."""
    found: dict[str, None] = {}
    for address in split_addresses(addresses):
        host, _, port = address.rpartition(":")
        try:
            async with asyncio.timeout(timeout_s):
                answers = await asyncio.get_running_loop().getaddrinfo(
                    host.strip("[]"), int(port), type=socket.SOCK_STREAM
                )
            resolved = sorted({str(answer[4][0]) for answer in answers})
            found |= dict.fromkeys(f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}" for ip in resolved)
        except (OSError, TimeoutError) as error:
            log.warning("scheduler_address_unknown", address=address, error=repr(error))
            found[address] = None
    return list(found)


def next_target(targets: Sequence[str], present: str, *, first: int) -> str:
    """The target after the present one, in a circle; `first` is where to begin, so that nodes spread over replicas."""
    if present in targets:
        return targets[(targets.index(present) + 1) % len(targets)]
    return targets[first % len(targets)]
