"""Full disks: nothing blocks, whoever asks is told, and all goes on by itself once there is room again.

Each part stands alone on a small file system, without a mesh: output of processes, bus, database, artifact store and
the cache of weights.
"""

import asyncio
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import asyncpg
import pytest
from grpc_health.v1 import health_pb2

from chassis import pki
from chassis.bus import PUBLISHING_HEALTH
from chassis.bus.connection import connect
from chassis.bus.outbox import Outbox
from chassis.bus.relay import Relay
from chassis.clock import SystemClock
from chassis.db.migrations import migrate
from chassis.db.pool import database_is_away, open_pool
from chassis.errors import ResourceExhausted
from chassis.ids import SystemIds
from chassis.objects.object_store import ObjectStore
from chassis.process import Process
from chassis.rpc.server import ServerBuilder
from chassis.rpc.untyped_errors import domain_error_of
from chassis.settings import ChassisSettings
from deploy.bus_users import OPERATOR, USERS
from deploy.local import bus_watch, supervisor
from deploy.local.broker import Broker
from deploy.local.bus_watch import BusWatch
from deploy.local.child import Child, Command
from deploy.local.disk_room import has_room
from deploy.local.health import health_of
from deploy.local.ports import PortClaims
from deploy.local.postgres_programs import system_user
from deploy.local.process_output import Output
from deploy.local.supervisor import ProcessFailed, Supervised
from formats.manifests import FileDigest
from formats.rows import PARQUET_MAGIC
from services.gateway.files.content_check import ContentCheck, ProcessLimits
from services.inference.config import InferenceSettings
from services.inference.models.domain import Weights
from services.inference.serving.weights_cache import WeightsCache
from tests.contract.gateway.world import CONVERSATION, gateway_world, refused
from tests.harness.endings import end_all
from tests.harness.living import living
from tests.harness.polling import eventually
from tests.harness.servers import SECRET, PostgresServer
from tests.harness.small_disk import SmallDisk, small_disk
from tests.store.chassis.world import Counted, World
from tests.unit.gateway.test_content_check import LIMITS as DATASET_LIMITS

MIB = 1024**2
FULL_DISK = Path(__file__).parents[2] / "deploy/nats/full-disk.sh"
WAITING = "SELECT count(*) FROM outbox WHERE published_at IS NULL"
# More than a pipe holds: whose lines nobody takes does not come to the end of this.
SPEAKER = "for number in range(2000): print(f'{number:0500}')"
# A row that PostgreSQL cannot press together.
NOISE = "SELECT string_agg(md5(random()::text), '') FROM generate_series(1, 40000)"


@pytest.fixture
def disk() -> Iterator[SmallDisk]:
    with small_disk() as disk:
        yield disk


async def test_whose_log_cannot_be_written_never_waits(disk: SmallDisk, tmp_path: Path) -> None:
    output = Output("speaker", disk.folder, None)
    output.write(b"before")
    disk.fill()
    child = await Child.start(
        Command(name="speaker", arguments=(sys.executable, "-c", SPEAKER), folder=tmp_path), output
    )
    try:
        assert await asyncio.wait_for(child.wait(), 60) == 0
    finally:
        await child.stop(0)
    disk.free()
    output.write(b"after")
    output.close()
    *_, dropped, last = (disk.folder / "speaker.log").read_text().splitlines()
    assert re.fullmatch(r"\[\d+ lines were dropped here: they could not be written\]", dropped)
    assert last == "after"


async def test_what_dies_on_a_full_disk_is_started_until_there_is_room(
    disk: SmallDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "RESTARTS_MAX", 3)
    monkeypatch.setattr(supervisor, "RESTART_DELAY_S_MAX", 0.1)
    told: list[str] = []

    async def ready() -> None:
        """As soon as it runs."""

    process = Supervised(
        Command(name="mayfly", arguments=("sh", "-c", "sleep 0.1; exit 1"), folder=tmp_path),
        Output("mayfly", tmp_path, None),
        wait_ready=ready,
        tell=told.append,
        has_room=lambda: has_room(disk.folder),
    )
    disk.fill()
    life = asyncio.create_task(process.run())
    try:
        await eventually(lambda: _value(process.restarts), lambda restarts: restarts > 6 or life.done())
        assert not life.done()
        assert any("mayfly ended (status 1); its disk is full: free space there" in line for line in told)
        disk.free()
        with pytest.raises(ProcessFailed, match="mayfly ended 3 times"):
            await asyncio.wait_for(life, 60)
    finally:
        await process.stop()
        await end_all([life])


async def test_a_bus_without_room_is_told_of_and_goes_on_with_room(
    disk: SmallDisk, database_url: str, tls_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus_watch, "LOOK_INTERVAL_S", 0.05)
    answer = health_pb2.HealthCheckResponse
    async with AsyncExitStack() as ends:
        bus = await ends.enter_async_context(_supervised_bus(disk))
        world, ask = await ends.enter_async_context(_publisher(bus.url, database_url, tls_dir))
        looks: list[bool] = []

        def look() -> bool:
            looks.append(has_room(disk.folder))
            return looks[-1]

        told: list[str] = []
        world.spawn(BusWatch(bus.process, [ask], has_room=look, tell=told.append).run)
        await world.add(_large(1))
        await world.until(WAITING, 0)
        assert await ask(PUBLISHING_HEALTH) == answer.SERVING
        disk.fill()
        await world.add(_large(2))
        await eventually(lambda: ask(PUBLISHING_HEALTH), lambda status: status == answer.NOT_SERVING)
        await eventually(lambda: _value(len(looks)), lambda count: count > 2)
        assert bus.process.restarts == 0, "a start on a full disk gives streams up"
        disk.free()
        await world.until(WAITING, 0)
        await eventually(lambda: ask(PUBLISHING_HEALTH), lambda status: status == answer.SERVING)
        assert (bus.process.restarts, told) == (1, ["nats takes no events and is started again"])
        assert (await world.bus.jetstream.stream_info("PROBE")).state.messages == 2


def test_the_container_of_the_bus_is_ill_without_room_and_starts_anew_with_room(disk: SmallDisk) -> None:
    with tempfile.TemporaryDirectory() as folder, subprocess.Popen(["sleep", "60"]) as server:
        check = ["sh", str(FULL_DISK), str(disk.folder), f"{folder}/was-full", str(server.pid)]
        try:
            assert subprocess.run(check).returncode == 0
            disk.fill()
            assert subprocess.run(check).returncode == 1
            assert server.poll() is None
            disk.free()
            assert subprocess.run(check).returncode == 0
            assert server.wait(60) == -signal.SIGTERM
            assert not Path(folder, "was-full").exists()
        finally:
            server.kill()


async def test_an_upload_without_room_is_refused_with_what_to_do_and_works_with_room(
    disk: SmallDisk, database_url: str, tls_dir: Path, tmp_path: Path
) -> None:
    store = disk.folder / "artifacts"
    content = CONVERSATION * 4000
    async with gateway_world(database_url, tls_dir, tmp_path, artifacts_url=store.as_uri()) as world:
        disk.fill()
        async with refused("DISK_FULL", "RESOURCE_EXHAUSTED") as told:
            await world.upload(content)
        assert told[0].message == (
            "the disk of the artifact store is full and nothing was kept; have space freed there, then repeat the call"
        )
        disk.free()
        assert (await world.upload(content)).size_bytes == len(content)
        assert len([path for path in store.rglob("*") if path.is_file()]) == 1


def test_a_file_that_cannot_be_checked_for_want_of_room_is_not_called_broken(disk: SmallDisk) -> None:
    content = PARQUET_MAGIC + os.urandom(4 * MIB)
    limits = ProcessLimits(inline_bytes_max=1000, check_s_max=60, memory_bytes_max=4 << 30, spool_dir=disk.folder)
    check = ContentCheck(DATASET_LIMITS, limits)
    disk.fill()
    try:
        with pytest.raises(ResourceExhausted) as raised:
            check.feed(content)
            check.finish()
    finally:
        check.close()
    assert (raised.value.reason, "is full" in raised.value.message) == ("DISK_FULL", True)


async def test_a_database_without_room_is_told_as_such(disk: SmallDisk, postgres: PostgresServer) -> None:
    place = disk.folder / "rows"
    place.mkdir(mode=0o700)
    if (user := system_user()) is not None:
        shutil.chown(place, user, user)
    connection = await asyncpg.connect(postgres.cluster.url())
    try:
        await connection.execute(f"CREATE TABLESPACE small LOCATION '{place}'")
        await connection.execute("CREATE TABLE small_rows (text text STORAGE EXTERNAL) TABLESPACE small")
        disk.fill()
        with pytest.raises(asyncpg.DiskFullError) as raised:
            await connection.execute(f"INSERT INTO small_rows {NOISE}")
        error = domain_error_of(raised.value, "trace")
        assert isinstance(error, ResourceExhausted)
        assert error.reason == "DISK_FULL"
        assert error.message.startswith("the disk of the database is full")
        assert database_is_away(raised.value), "loops try again"
        disk.free()
        await connection.execute(f"INSERT INTO small_rows {NOISE}")
    finally:
        await connection.execute("DROP TABLE IF EXISTS small_rows")
        await connection.execute("DROP TABLESPACE IF EXISTS small")
        await connection.close()


async def test_weights_without_room_leave_nothing_and_come_with_room(disk: SmallDisk, tmp_path: Path) -> None:
    content = os.urandom(MIB)
    file = FileDigest(path="model.safetensors", size_bytes=MIB, sha256=hashlib.sha256(content).hexdigest())
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / file.path).write_bytes(content)
    objects = ObjectStore(tmp_path.as_uri(), part_bytes=8 * MIB, parts_in_flight_max=1)
    cache = WeightsCache(InferenceSettings(data_dir=disk.folder), objects)
    weights = Weights(revision="rv_1", key="models/", files=(file,))
    await cache.tidy()
    disk.fill()
    with pytest.raises(OSError) as raised:
        async with cache.use(weights):
            pass
    error = domain_error_of(raised.value, "trace")
    assert (error.code.name, error.reason) == ("RESOURCE_EXHAUSTED", "DISK_FULL")
    assert str(disk.folder) not in error.message
    assert [path.name for path in (disk.folder / "weights").iterdir()] == [".room"]
    disk.free()
    async with cache.use(weights) as folder:
        assert (folder / file.path).read_bytes() == content


class _Bus:
    def __init__(self, process: Supervised, url: str) -> None:
        self.process = process
        self.url = url


@asynccontextmanager
async def _supervised_bus(disk: SmallDisk) -> AsyncIterator[_Bus]:
    """As the launcher keeps it."""
    claims, folder = PortClaims(), disk.folder / "nats"
    folder.mkdir(mode=0o700)
    port, passwords = claims.pick(["nats"], {})["nats"], dict.fromkeys(USERS, SECRET)
    broker = Broker(folder=folder, port=port, passwords=passwords)
    process = Supervised(
        broker.command(), Output("nats", disk.folder, None), wait_ready=broker.wait_ready, tell=lambda text: None
    )
    life = asyncio.create_task(process.run())
    try:
        await asyncio.wait_for(process.healthy.wait(), 60)
        yield _Bus(process, broker.url(OPERATOR))
    finally:
        await process.stop()
        await end_all([life])
        claims.release()


@asynccontextmanager
async def _publisher(nats_url: str, database_url: str, tls_dir: Path) -> AsyncIterator[tuple[World, bus_watch.Ask]]:
    """A service with an outbox and a relay, and the way to ask for its health."""
    settings = ChassisSettings(
        service_name="tester",
        database_url=database_url,
        nats_url=nats_url,
        tls_dir=tls_dir,
        publish_timeout_s=0.5,
        publish_alarm_s=1.0,
        reconnect_backoff_s_max=0.2,
        stream_size_bytes_max=4 * MIB,
    )
    pool = await open_pool(settings)
    await migrate(pool, [])
    bus = await connect(settings)
    world = World(settings=settings, pool=pool, bus=bus, outbox=Outbox(settings, clock=SystemClock(), ids=SystemIds()))

    async def serve(process: Process) -> None:
        server = ServerBuilder(process, settings)
        bus.report_to(server.component)
        await server.start()
        addresses.append(server.address)

    addresses: list[str] = []
    async with living(settings, serve), health_of(pki.load(tls_dir, "operator"), addresses[0], "tester") as ask:
        world.spawn(Relay(pool, bus, world.outbox, clock=SystemClock()).run)
        yield world, ask
        await end_all(world.tasks)
        await bus.client.close()
        await pool.close()


def _large(number: int) -> Counted:
    return Counted(name="x" * 64 * 1024, amount=number)


async def _value(value: int) -> int:
    return value
