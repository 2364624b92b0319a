"""Local copies of weights keep within their limit, whoever shares the folder and whoever dies, and none goes while it
is in use."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import random
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from chassis.errors import DataLoss, ResourceExhausted
from chassis.objects.object_store import ObjectStore
from formats.manifests import FileDigest
from services.inference.config import InferenceSettings
from services.inference.models.domain import Weights
from services.inference.serving import weights_folders
from services.inference.serving.weights_cache import WeightsCache
from tests.harness.polling import eventually

SIZE_BYTES = 1000
MIB = 1024 * 1024
# Another process that keeps a folder, or begins to fill one; it says when, and goes on until it is killed.
NEIGHBOUR = """
import sys
from pathlib import Path
from services.inference.serving import weights_folders
root, what = Path(sys.argv[1]), sys.argv[2]
if what == "uses":
    assert weights_folders.hold(root / "rv_0") is not None
else:
    partial, _ = weights_folders.reserve(root, "rv_9", 1000, 2000)
    (partial / "half").write_bytes(b"x" * 500)
print("ready", flush=True)
sys.stdin.read()
"""


class Disk:
    """An artifact store with weights of equal size, and caches that share one folder."""

    def __init__(self, folder: Path, count: int) -> None:
        self.store, self.root, self.count = folder / "store", folder / "weights", count
        for number in range(count):
            files = self.store / f"models/{number}"
            files.mkdir(parents=True)
            (files / "model.safetensors").write_bytes(self.content(number))

    def content(self, number: int) -> bytes:
        return bytes([number]) * SIZE_BYTES

    def weights(self, number: int) -> Weights:
        digest = hashlib.sha256(self.content(number)).hexdigest()
        file = FileDigest(path="model.safetensors", size_bytes=SIZE_BYTES, sha256=digest)
        return Weights(revision=f"rv_{number}", key=f"models/{number}/", files=(file,))

    def cache(self, *, holds: int) -> WeightsCache:
        objects = ObjectStore(self.store.as_uri(), part_bytes=8 * MIB, parts_in_flight_max=1)
        settings = InferenceSettings(data_dir=self.root.parent, weights_cache_bytes_max=holds * SIZE_BYTES)
        return WeightsCache(settings, objects)

    def kept(self) -> set[str]:
        """The complete copies."""
        return {folder.name for folder in self.root.iterdir() if not folder.name.startswith(".")}

    def unfinished(self) -> list[str]:
        return [folder.name for folder in self.root.iterdir() if folder.is_dir() and folder.name.startswith(".")]

    @asynccontextmanager
    async def neighbour(self, what: str) -> AsyncIterator[asyncio.subprocess.Process]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", NEIGHBOUR, str(self.root), what),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        assert (await process.stdout.readline()).strip() == b"ready"
        yield process
        process.kill()
        await process.wait()


async def touch(cache: WeightsCache, disk: Disk, number: int) -> None:
    async with cache.use(disk.weights(number)) as folder:
        assert (folder / "model.safetensors").read_bytes() == disk.content(number)


async def let_go(disk: Disk) -> None:
    """Returns once nobody holds a copy any more, which happens in threads after its last use."""

    def is_free() -> bool:
        for revision in disk.kept():
            descriptor = os.open(disk.root / revision, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            finally:
                os.close(descriptor)
        return True

    await eventually(lambda: asyncio.to_thread(is_free), pause_s=0.005)


async def test_the_longest_unused_copy_makes_room(tmp_path: Path) -> None:
    disk = Disk(tmp_path, 4)
    cache = disk.cache(holds=2)
    for number in (0, 1, 0):
        await touch(cache, disk, number)
        await let_go(disk)
    await touch(cache, disk, 2)
    assert disk.kept() == {"rv_0", "rv_2"}
    await let_go(disk)
    await touch(cache, disk, 3)
    assert disk.kept() == {"rv_2", "rv_3"}


async def test_a_copy_in_use_never_makes_room(tmp_path: Path) -> None:
    disk = Disk(tmp_path, 3)
    cache = disk.cache(holds=2)
    async with AsyncExitStack() as used:
        for number in (0, 1):
            await used.enter_async_context(cache.use(disk.weights(number)))
        with pytest.raises(ResourceExhausted) as refused:
            await touch(cache, disk, 2)
        assert refused.value.metadata["limit"] == "weights_cache_bytes_max"
        # One of several users who leaves leaves the others theirs.
        await touch(cache, disk, 0)
        with pytest.raises(ResourceExhausted):
            await touch(cache, disk, 2)
    await let_go(disk)
    await touch(cache, disk, 2)
    assert len(disk.kept()) == 2 and not disk.unfinished()


async def test_a_copy_that_another_process_uses_makes_room_when_that_process_dies(tmp_path: Path) -> None:
    disk = Disk(tmp_path, 2)
    cache = disk.cache(holds=1)
    await touch(cache, disk, 0)
    await let_go(disk)
    async with disk.neighbour("uses"):
        with pytest.raises(ResourceExhausted):
            await touch(cache, disk, 1)
        assert disk.kept() == {"rv_0"}
    await touch(cache, disk, 1)
    assert disk.kept() == {"rv_1"}


async def test_what_another_process_fills_counts_and_goes_when_that_process_dies(tmp_path: Path) -> None:
    disk = Disk(tmp_path, 2)
    cache = disk.cache(holds=2)
    await touch(cache, disk, 0)
    await let_go(disk)
    async with disk.neighbour("fills"):
        assert disk.kept() == {"rv_0"}
        async with cache.use(disk.weights(0)):
            with pytest.raises(ResourceExhausted):
                await touch(cache, disk, 1)
        assert len(disk.unfinished()) == 1
    await cache.tidy()
    assert not disk.unfinished()
    await touch(cache, disk, 1)
    assert disk.kept() == {"rv_0", "rv_1"}


async def test_a_broken_download_leaves_nothing_behind(tmp_path: Path) -> None:
    disk = Disk(tmp_path, 1)
    (disk.store / "models/0/model.safetensors").write_bytes(b"y" * SIZE_BYTES)
    cache = disk.cache(holds=1)
    for _ in range(2):
        with pytest.raises(DataLoss):
            await touch(cache, disk, 0)
    assert not disk.kept() and not disk.unfinished()


async def test_callers_share_one_download_and_one_that_leaves_ends_it_for_nobody(tmp_path: Path) -> None:
    disk = Disk(tmp_path, 1)
    cache = disk.cache(holds=1)
    callers = [asyncio.ensure_future(touch(cache, disk, 0)) for _ in range(10)]
    await asyncio.sleep(0)
    callers[0].cancel()
    results = await asyncio.gather(*callers, return_exceptions=True)
    assert [result for result in results if result is not None] == [results[0]]
    assert isinstance(results[0], asyncio.CancelledError)
    assert disk.kept() == {"rv_0"}


async def test_two_that_share_a_folder_never_take_a_copy_from_each_other(tmp_path: Path) -> None:
    disk = Disk(tmp_path, 16)
    caches = [disk.cache(holds=10) for _ in range(2)]
    chance = random.Random(7)
    sizes = []

    async def work(cache: WeightsCache) -> None:
        for _ in range(25):
            number = chance.randrange(disk.count)
            async with cache.use(disk.weights(number)) as folder:
                await asyncio.sleep(0.001)
                assert (folder / "model.safetensors").read_bytes() == disk.content(number)
                sizes.append(len(disk.kept()))

    # At most four in use and four that are made room for, of ten.
    await asyncio.gather(*(work(cache) for cache in caches for _ in range(2)))
    assert max(sizes) <= 10
    assert not disk.unfinished()


def test_a_lock_is_on_the_copy_and_not_on_its_name(tmp_path: Path) -> None:
    """Whoever opened a folder that was deleted meanwhile holds nothing."""
    (tmp_path / "rv_0").mkdir()
    held = weights_folders.hold(tmp_path / "rv_0")
    assert held is not None
    (tmp_path / "rv_0").rename(tmp_path / ".gone-0")
    assert weights_folders.hold(tmp_path / "rv_0") is None
