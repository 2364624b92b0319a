"""The users of the bus on a real nats-server: what each service needs works, and what belongs to others is refused."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import nats
import pytest
from nats.aio.client import Client
from nats.js import api

from chassis.bus.connection import Bus, connect
from chassis.bus.durables import DURABLES
from chassis.bus.subjects import stream_of
from chassis.settings import ChassisSettings
from deploy import bus_users
from tests.harness.servers import NatsServer

each_service = pytest.mark.parametrize("service", bus_users.SERVICES)
READERS = [(stream, durable.name) for stream, durables in DURABLES.items() for durable in durables]


@asynccontextmanager
async def bus_of(server: NatsServer, service: str) -> AsyncIterator[Bus]:
    bus = await connect(ChassisSettings(service_name=service, nats_url=server.broker.url(service), publish_timeout_s=5))
    try:
        yield bus
    finally:
        await bus.close()


@asynccontextmanager
async def watched(server: NatsServer, user: str) -> AsyncIterator[tuple[Client, asyncio.Queue[str]]]:
    """A connection as the user, and what the server refuses it."""
    refusals: asyncio.Queue[str] = asyncio.Queue()

    async def on_error(error: Exception) -> None:
        refusals.put_nowait(str(error).lower())

    client = await nats.connect(server.broker.url(user), error_cb=on_error)
    try:
        yield client, refusals
    finally:
        await client.close()


async def refused(refusals: asyncio.Queue[str], subject: str) -> None:
    async with asyncio.timeout(10):
        told = await refusals.get()
    assert "permissions violation" in told, told
    assert f'"{subject.lower()}"' in told, told


def is_of(reader: str, service: str) -> bool:
    return reader.partition("-")[0] == service


async def test_each_service_does_its_work_as_its_own_user(nats_server: NatsServer) -> None:
    for service, subjects in bus_users.PUBLISHED.items():
        async with bus_of(nats_server, service) as bus:
            for subject in subjects:
                stream = stream_of(subject)
                await bus.ensure_stream(stream)
                await bus.jetstream.publish(subject, b"event", stream=stream)
                await bus.jetstream.consumers_info(stream)
    for stream, reader in READERS:
        async with bus_of(nats_server, reader.partition("-")[0]) as bus:
            await bus.ensure_stream(stream)
            (declared,) = (each for each in DURABLES[stream] if each.name == reader)
            await bus.ensure_durable(stream, declared)
            subscription = await bus.jetstream.pull_subscribe_bind(durable=reader, stream=stream)
            for message in await subscription.fetch(1, timeout=5):
                await message.ack_sync()
            assert (await subscription.consumer_info()).ack_floor.stream_seq >= 1
    # Verification reads beside the archive, and relays delete what all have handled.
    async with bus_of(nats_server, "billing") as bus:
        for stream in ("USAGE", "TUNING"):
            config = api.ConsumerConfig(ack_policy=api.AckPolicy.NONE, inactive_threshold=60.0, mem_storage=True)
            made = await bus.jetstream.add_consumer(stream, config)
            subscription = await bus.jetstream.pull_subscribe_bind(made.name, stream=stream)
            assert await subscription.fetch(1, timeout=5)
    for service, subjects in bus_users.PUBLISHED.items():
        async with bus_of(nats_server, service) as bus:
            for subject in subjects:
                await bus.jetstream.purge_stream(stream_of(subject), seq=1)


@each_service
async def test_events_of_others_are_not_published(nats_server: NatsServer, service: str) -> None:
    own = bus_users.PUBLISHED[service]
    foreign = [subject for each in bus_users.PUBLISHED.values() for subject in each if subject not in own]
    async with watched(nats_server, service) as (client, refusals):
        for subject in foreign:
            await client.publish(subject, b"forged")
            await refused(refusals, subject)


@each_service
async def test_streams_and_readers_of_others_are_out_of_reach(nats_server: NatsServer, service: str) -> None:
    streams = sorted({stream_of(subject) for each in bus_users.PUBLISHED.values() for subject in each})
    requests = [
        f"$JS.API.{verb}.{stream}"
        for stream in streams
        for verb in ("STREAM.DELETE", "STREAM.MSG.GET", "STREAM.MSG.DELETE", "CONSUMER.DURABLE.CREATE")
    ]
    requests = [f"{each}.mine" if each.startswith("$JS.API.CONSUMER.DURABLE") else each for each in requests]
    for stream, reader in READERS:
        requests.append(f"$JS.API.CONSUMER.DELETE.{stream}.{reader}")
        if not is_of(reader, service):
            requests += [f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{reader}", f"$JS.ACK.{stream}.{reader}.1.1.1.1.0"]
    requests += ["$JS.API.STREAM.CREATE.OTHER", "$JS.API.STREAM.LIST", "$JS.API.ACCOUNT.PURGE.$G"]
    async with watched(nats_server, service) as (client, refusals):
        for subject in requests:
            await client.publish(subject, b"")
            await refused(refusals, subject)


@each_service
async def test_nobody_listens_to_others(nats_server: NatsServer, service: str) -> None:
    others = [f"_INBOX.{other}.>" for other in bus_users.USERS if other != service]
    async with watched(nats_server, service) as (client, refusals):
        for subject in ("usage.>", "tuning.job.ended", "$JS.ACK.>", "_INBOX.>", ">", *others):
            await client.subscribe(subject)
            await refused(refusals, subject)


async def test_without_a_password_nobody_connects(nats_server: NatsServer) -> None:
    for url in (
        f"nats://127.0.0.1:{nats_server.broker.port}",
        f"nats://billing:wrong@127.0.0.1:{nats_server.broker.port}",
    ):
        with pytest.raises(nats.errors.Error, match=r"(?i)authorization"):
            await nats.connect(url, allow_reconnect=False, max_reconnect_attempts=0)
