"""Devices of the engines that serve everybody: leased from the scheduler as those of endpoints are. Not pure: gRPC.

It decides neither which engines there are nor which of them need devices: an engine on a CPU needs none.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Protocol

import structlog

from chassis.clock import Clock
from chassis.errors import Aborted, DomainError, NotFound
from services.inference.config import InferenceSettings
from services.inference.engines.base import EngineBusy
from services.inference.serving.device_leases import DeviceLeases, Devices
from services.inference.serving.trouble import is_passing

log = structlog.get_logger()


class Tenant(Protocol):
    """The engine that the devices are for."""

    def serve_until(self, until_s: float) -> None:
        """Until when they are certainly its own."""

    def idle_s(self) -> float:
        """For how long nobody has used it."""

    def end(self) -> None:
        """It has to leave them, or nobody wants it any more."""


class SharedDevices:
    """The devices that `holder`, this start of the process, has for such engines."""

    def __init__(self, leases: DeviceLeases, *, holder: str, settings: InferenceSettings, clock: Clock) -> None:
        self._leases = leases
        self._holder = holder
        self._settings = settings
        self._clock = clock

    @asynccontextmanager
    async def held(self, revision: str, tenant: Tenant) -> AsyncIterator[tuple[int, ...]]:
        """The devices of one engine for the length of the block; EngineBusy when none are free."""
        owner = f"nodes/{self._settings.node_name or 'only'}/engines/{self._holder}-{revision}"
        given = await self._leases.ask(owner, hardware_type="", count=self._settings.shared_engine_gpus)
        if isinstance(given, str):
            raise EngineBusy(f"there is no device for the engine of this model; it waits for {given}")
        keeping: asyncio.Task[None] | None = None
        try:
            tenant.serve_until(await self._leases.renew(owner, given.lease_token))
            keeping = asyncio.create_task(self._keep(owner, given, tenant), name=f"devices-of-{revision}")
            yield given.indices
        finally:
            if keeping is not None:
                keeping.cancel()
                with suppress(asyncio.CancelledError):
                    await keeping
            await self._give_back(owner, given)

    async def _keep(self, owner: str, given: Devices, tenant: Tenant) -> None:
        while True:
            await self._clock.sleep(self._settings.device_renewal_s)
            if tenant.idle_s() > self._settings.shared_engine_idle_s_max:
                log.info("engine_idle", owner=owner)
                tenant.end()
                return
            try:
                tenant.serve_until(await self._leases.renew(owner, given.lease_token))
            except (Aborted, NotFound) as error:
                log.warning("devices_lost", owner=owner, error=str(error))
                tenant.end()
                return
            except DomainError as error:
                # Its deadline ends the engine, if this lasts.
                log.warning("devices_not_renewed", owner=owner, error=str(error))

    async def _give_back(self, owner: str, given: Devices) -> None:
        try:
            await self._leases.give_back(owner, given.lease_token)
        except DomainError as error:
            if not is_passing(error):
                raise
            log.warning("devices_left_to_expire", owner=owner, error=str(error))
