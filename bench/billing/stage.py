"""What the benchmarks of billing stand on: a real PostgreSQL with its defaults, a synced JetStream,
and the real daemon.

It measures nothing itself.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from chassis import pki
from chassis.db.pool import Pool, open_pool
from chassis.settings import ChassisSettings
from services.billing.config import BillingSettings
from tests.harness.servers import NatsServer, PostgresServer, running_nats, running_postgres

CERTIFIED = ("billing", "gateway", "scheduler", "inference")
START_S_MAX = 60


@dataclass(frozen=True, kw_only=True)
class Stage:
    """`database_url` is billing's, `meter_url` that of a service that emits usage; `address` is billing's door."""

    postgres: PostgresServer
    nats: NatsServer
    database_url: str
    meter_url: str
    tls_dir: Path
    address: str
    pool: Pool

    def settings(self, service_name: str, **changes: object) -> ChassisSettings:
        given = {"database_url": self.meter_url, "nats_url": self.nats.url, "tls_dir": self.tls_dir, **changes}
        return ChassisSettings(service_name=service_name, **given)  # type: ignore[arg-type]


@asynccontextmanager
async def stage(folder: Path) -> AsyncIterator[Stage]:
    """Everything running and billing healthy; gone after."""
    tls_dir = folder / "tls"
    tls_dir.mkdir()
    (folder / "nats").mkdir()
    pki.create_authority(tls_dir)
    for name in CERTIFIED:
        pki.issue(tls_dir, name)
    async with (
        running_postgres(folder / "postgres") as postgres,
        running_nats(folder / "nats") as nats,
        postgres.scratch() as database_url,
        postgres.scratch() as meter_url,
        _billing(folder, database_url, nats.url, tls_dir) as address,
    ):
        pool = await open_pool(BillingSettings(database_url=database_url))
        try:
            yield Stage(
                postgres=postgres,
                nats=nats,
                database_url=database_url,
                meter_url=meter_url,
                tls_dir=tls_dir,
                address=address,
                pool=pool,
            )
        finally:
            await pool.close()


@asynccontextmanager
async def _billing(folder: Path, database_url: str, nats_url: str, tls_dir: Path) -> AsyncIterator[str]:
    """The daemon in a process of its own, with the settings that it has everywhere."""
    port_file = folder / "billing.port"
    environment = {
        **os.environ,
        "FINEMESH_BILLING_DATABASE_URL": database_url,
        "FINEMESH_NATS_URL": nats_url,
        "FINEMESH_TLS_DIR": str(tls_dir),
        "FINEMESH_BILLING_PORT_FILE": str(port_file),
    }
    with (folder / "billing.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.billing.main", env=environment, stdout=log, stderr=log
        )
        try:
            try:
                async with asyncio.timeout(START_S_MAX):
                    while not port_file.exists() and process.returncode is None:  # noqa: ASYNC110 - another process writes
                        await asyncio.sleep(0.02)
            finally:
                if not port_file.exists():
                    print((folder / "billing.log").read_text()[-4000:], file=sys.stderr)
            yield f"127.0.0.1:{port_file.read_text().strip()}"
        finally:
            if process.returncode is None:
                process.terminate()
            await process.wait()
