"""Who watches a server's calls sees each once, before its handler and after it, whatever the shape of the method."""

import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.wrappers_pb2 import StringValue

from chassis.errors import DomainError, NotFound, Unavailable
from chassis.rpc.server import ServerBuilder
from tests.harness.living import living

from .echo import SERVICE, Echo, EchoStub, add_echo_to_server, settings_of, stub_of


class Seen(Echo):
    """Watches itself, all methods but `Say`; `refuses` makes the witness refuse."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.refuses = False

    def witnessing(self, method: str) -> Callable[[], Any] | None:
        return None if method == f"/{SERVICE}/Say" else lambda: self

    async def asked(self, content: bytes) -> None:
        self.told.append(f"asked {StringValue.FromString(content).value}")
        if self.refuses:
            raise Unavailable("DEPENDENCY_UNAVAILABLE", "nothing can be kept now")

    async def ended(self, outcome: str, response: Any = None) -> None:
        self.told.append(f"ended {outcome}")

    async def Count(self, request: StringValue, context: object) -> AsyncIterator[StringValue]:
        self.told.append("served")
        if request.value == "0":
            raise NotFound("NOT_FOUND", "there is nothing to count")
        yield request

    async def Join(self, requests: AsyncIterator[StringValue], context: object) -> StringValue:
        first = await anext(requests)
        self.told.append("served")
        return StringValue(value=first.value + "".join([request.value async for request in requests]))

    async def Talk(self, requests: AsyncIterator[StringValue], context: object) -> AsyncIterator[StringValue]:
        async for request in requests:
            self.told.append("served")
            yield request


@contextlib.asynccontextmanager
async def watched(tls_dir: Path) -> AsyncIterator[tuple[Seen, EchoStub]]:
    seen, settings = Seen(), settings_of("back", tls_dir)
    async with living(settings) as process:
        builder = ServerBuilder(process, settings, witnessing=seen.witnessing)
        builder.add(add_echo_to_server, seen, SERVICE, {"front"})
        await builder.start()
        async with stub_of(settings_of("front", tls_dir), builder.port, "back") as stub:
            yield seen, stub


async def calls_of(stub: EchoStub, value: str) -> AsyncIterator[Any]:
    """One call of each shape that is watched, when it is over."""
    yield [each.value async for each in stub.Count(StringValue(value=value))]
    yield (await stub.Join(iter([StringValue(value=value)]))).value
    yield [each.value async for each in stub.Talk(iter([StringValue(value=value)]))]


async def test_each_shape_of_a_method_is_seen_before_and_after(tls_dir: Path) -> None:
    async with watched(tls_dir) as (seen, stub):
        assert [answer async for answer in calls_of(stub, "7")] == [["7"], "7", ["7"]]
        assert seen.told == ["asked 7", "served", "ended OK"] * 3
        await stub.Say(StringValue(value="7"))
        assert len(seen.told) == 9


async def test_a_failure_is_seen_by_its_reason(tls_dir: Path) -> None:
    async with watched(tls_dir) as (seen, stub):
        with pytest.raises(NotFound):
            [each async for each in stub.Count(StringValue(value="0"))]
        assert seen.told == ["asked 0", "served", "ended NOT_FOUND"]


async def test_what_the_witness_refuses_is_not_served(tls_dir: Path) -> None:
    async with watched(tls_dir) as (seen, stub):
        seen.refuses = True
        for call in (stub.Count(StringValue(value="7")), stub.Talk(iter([StringValue(value="7")]))):
            with pytest.raises(DomainError) as caught:
                [each async for each in call]
            assert caught.value.reason == "DEPENDENCY_UNAVAILABLE"
        with pytest.raises(Unavailable):
            await stub.Join(iter([StringValue(value="7")]))
        assert "served" not in seen.told
