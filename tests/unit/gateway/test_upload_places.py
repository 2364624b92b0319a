"""Slots for uploads and places for checks: nobody gets all, and organizations are served in turn."""

import asyncio
from contextlib import ExitStack

import pytest

from chassis.errors import ResourceExhausted
from services.gateway.files.upload_places import CheckPlaces, Uploader, UploadSlots


def uploader(organization: str, key: str) -> Uploader:
    return Uploader(organization_id=organization, key_id=key)


def test_a_key_an_organization_and_all_have_their_bounds() -> None:
    slots = UploadSlots(uploads_max=4, per_organization_max=3, per_key_max=2)
    with ExitStack() as held:
        for organization, key in (("a", "a1"), ("a", "a1"), ("a", "a2"), ("b", "b1")):
            held.enter_context(slots.take(uploader(organization, key)))
        for organization, key, limit in (("a", "a1", "uploads_max"), ("c", "c1", "uploads_max")):
            with pytest.raises(ResourceExhausted) as told, slots.take(uploader(organization, key)):
                raise AssertionError
            assert told.value.metadata["limit"] == limit
    with ExitStack() as held:
        for organization, key in (("a", "a1"), ("a", "a1"), ("a", "a2")):
            held.enter_context(slots.take(uploader(organization, key)))
        with pytest.raises(ResourceExhausted, match="uploads_per_organization_max"), slots.take(uploader("a", "a2")):
            raise AssertionError
        with slots.take(uploader("b", "b1")):
            pass
    with slots.take(uploader("a", "a1")), slots.take(uploader("a", "a1")):
        with pytest.raises(ResourceExhausted, match="uploads_per_key_max"), slots.take(uploader("a", "a1")):
            raise AssertionError
        with slots.take(uploader("a", "a2")):
            pass


class Checks:
    """Each runs until it is told to end."""

    def __init__(self, places_max: int) -> None:
        self.places = CheckPlaces(places_max)
        self.begun: list[str] = []
        self.ends: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def begin(self, *names: str) -> None:
        """Of an organization named by the first letter."""
        for name in names:
            self.ends[name] = asyncio.Event()
            self.tasks[name] = asyncio.create_task(self._check(name))
        await asyncio.sleep(0.001)

    async def end(self, name: str) -> None:
        self.ends[name].set()
        await self.tasks[name]
        await asyncio.sleep(0.001)

    async def _check(self, name: str) -> None:
        async with self.places.take(name[0]):
            self.begun.append(name)
            await self.ends[name].wait()


async def test_one_organization_never_has_all_places_and_they_take_turns() -> None:
    checks = Checks(3)
    await checks.begin("a1", "a2", "a3", "a4", "a5")
    assert checks.begun == ["a1", "a2"]
    await checks.begin("b1", "b2", "c1")
    assert checks.begun == ["a1", "a2", "b1"]
    await checks.end("a1")
    assert checks.begun == ["a1", "a2", "b1", "a3"]
    await checks.end("b1")
    await checks.end("a2")
    assert checks.begun == ["a1", "a2", "b1", "a3", "b2", "c1"]
    for task in checks.tasks.values():
        task.cancel()


async def test_whoever_goes_away_leaves_the_line_and_its_place() -> None:
    checks = Checks(1)
    await checks.begin("a1", "a2", "b1")
    checks.tasks["a2"].cancel()
    await asyncio.wait({checks.tasks["a2"]})
    checks.tasks["a1"].cancel()
    await asyncio.wait({checks.tasks["a1"]})
    await checks.end("b1")
    await checks.begin("c1")
    assert checks.begun == ["a1", "b1", "c1"]
    await checks.end("c1")
