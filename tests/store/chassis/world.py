"""What the event tests work with: one service's view of its servers, and event classes that belong to no service."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message

from chassis.bus.connection import Bus
from chassis.bus.outbox import Outbox
from chassis.db.pool import Pool, transaction
from chassis.settings import ChassisSettings
from finemesh.common.v1 import event_options_pb2

WAIT_S_MAX = 30.0


def _event_class(name: str, subject: str) -> Any:
    """Any, because its fields are known only when it runs."""
    file = descriptor_pb2.FileDescriptorProto(
        name=f"chassis_test/{name}.proto",
        package="chassis_test",
        syntax="proto3",
        dependency=["finemesh/common/v1/event_options.proto"],
    )
    message = file.message_type.add(name=name)
    message.options.Extensions[event_options_pb2.subject] = subject
    for number, (field_name, kind) in enumerate((("name", 9), ("amount", 3)), start=1):
        message.field.add(name=field_name, number=number, type=kind, label=1)
    pool = descriptor_pool.Default()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"chassis_test.{name}"))


Counted = _event_class("Counted", "probe.counted")
Ignored = _event_class("Ignored", "probe.ignored")
# It lives in another stream.
Elsewhere = _event_class("Elsewhere", "elsewhere.counted")
# The same subject as Counted, as a type that a newer release may send there.
Newer = _event_class("Newer", "probe.counted")


@dataclass(kw_only=True)
class World:
    """One service's view: its pool, its bus, its outbox."""

    settings: ChassisSettings
    pool: Pool
    bus: Bus
    outbox: Outbox
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def spawn(self, run: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        async def body() -> None:
            await run()

        task = asyncio.create_task(body())
        self.tasks.append(task)
        return task

    async def add(self, message: Message, *, key: str | None = None) -> None:
        async with transaction(self.pool) as connection:
            await self.outbox.add(connection, message, subject_name="probes/1", key=key)
        self.outbox.wake()

    async def until(self, query: str, expected: object) -> None:
        """Waits until `query` answers `expected`; TimeoutError tells what it answered last."""
        answer: object = None
        try:
            async with asyncio.timeout(WAIT_S_MAX):
                while (answer := await self.pool.fetchval(query)) != expected:
                    for task in self.tasks:
                        if task.done() and not task.cancelled():
                            await task
                    # Rows tell nobody that they are there.
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise TimeoutError(f"{query} answered {answer}, not {expected}") from None
