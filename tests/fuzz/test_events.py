"""Every event of the contracts, made up and damaged, on the real bus: readers book it, or set it aside with a reason.

An event that ends in a defect of ours would be tried again and again, and no person could tell what is wrong with it.
"""

import functools
import importlib
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import asyncpg
import nats
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor
from hypothesis import given
from hypothesis import strategies as st
from nats.js import JetStreamContext
from nats.js.errors import NotFoundError

from chassis.bus.subjects import stream_of, subject_of
from chassis.errors import DomainError
from finemesh.common.v1 import event_options_pb2
from tests.fuzz.mesh import FuzzedMesh
from tests.fuzz.messages import GENERATED, encoded
from tests.fuzz.run import fuzzed
from tests.harness.polling import eventually

# What became of an event: handled, set aside, or to be tried again, with the reason and the error.
_SEEN = """
    SELECT '' AS reason, '' AS error FROM inbox WHERE event_id = $1
    UNION ALL SELECT reason, error FROM dead_letters WHERE event_id = $1
    UNION ALL SELECT '' AS reason, error FROM handler_failures WHERE event_id = $1
"""


def every_event() -> list[Descriptor]:
    found = []
    for path in sorted((GENERATED / "finemesh/events").rglob("*_pb2.py")):
        name = ".".join(path.relative_to(GENERATED).with_suffix("").parts)
        messages = importlib.import_module(name).DESCRIPTOR.message_types_by_name.values()
        found += [each for each in messages if each.GetOptions().Extensions[event_options_pb2.subject]]
    return found


EVENTS = every_event()


@pytest.mark.parametrize("event", EVENTS, ids=[each.name for each in EVENTS])
@fuzzed()
@given(data=st.data())
async def test_no_event_makes_a_defect(fuzzed_mesh: FuzzedMesh, event: Descriptor, data: Any) -> None:
    payload = data.draw(encoded(event))
    subject = subject_of(message_factory.GetMessageClass(event))
    headers = {
        "ce-id": str(uuid.uuid4()),
        "ce-type": event.full_name,
        "ce-source": "fuzz",
        "ce-subject": data.draw(st.sampled_from(["", *fuzzed_mesh.names.values()])),
        "ce-time": datetime.now(UTC).isoformat(),
    }
    bus = await nats.connect(fuzzed_mesh.nats_url)
    try:
        jetstream = bus.jetstream()
        readers = [name for name in await _readers(jetstream, subject) if name in fuzzed_mesh.database_urls]
        if readers:
            await jetstream.publish(subject, payload, headers=headers)
    finally:
        await bus.close()
    for reader in readers:
        found = await eventually(functools.partial(_became, fuzzed_mesh.database_urls[reader], headers["ce-id"]))
        assert all(map(_is_typed, found)), f"{reader}: {found}\nsent: {payload!r}"


async def test_every_service_that_reads_events_is_here(fuzzed_mesh: FuzzedMesh) -> None:
    bus = await nats.connect(fuzzed_mesh.nats_url)
    try:
        subjects = [subject_of(message_factory.GetMessageClass(event)) for event in EVENTS]
        readers = {name for subject in subjects for name in await _readers(bus.jetstream(), subject)}
    finally:
        await bus.close()
    assert {"billing", "inference", "scheduler"} <= readers


async def _readers(jetstream: JetStreamContext, subject: str) -> list[str]:
    """The durable consumers that get events of this subject; none where nobody made its stream."""
    readers = []
    try:
        infos = await jetstream.consumers_info(stream_of(subject))
    except NotFoundError:
        return []
    for info in infos:
        wanted = info.config.filter_subjects or [info.config.filter_subject or ">"]
        if any(each == subject or (each.endswith(">") and subject.startswith(each[:-1])) for each in wanted):
            readers.append(str(info.config.durable_name))
    return readers


async def _became(database_url: str, event_id: str) -> list[asyncpg.Record]:
    connection = await asyncpg.connect(database_url)
    try:
        return await connection.fetch(_SEEN, uuid.UUID(event_id))
    finally:
        await connection.close()


def _is_typed(row: asyncpg.Record) -> bool:
    """Handled, known to be wrong at the first try, or refused by an error of ours that says why."""
    return row["error"] == "" or row["reason"] == "EVENT_INVALID" or row["error"].partition(":")[0] in _TYPED


def _names(kind: type[Exception]) -> Iterator[str]:
    for each in kind.__subclasses__():
        yield each.__name__
        yield from _names(each)


_TYPED = frozenset(_names(DomainError))
