"""Every method of every contract, public and inner: no request makes a defect of ours, and the service goes on."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st

from chassis.errors import DomainError
from tests.fuzz.mesh import FuzzedMesh
from tests.fuzz.messages import encoded, every_method
from tests.fuzz.outcome import judge
from tests.fuzz.run import fuzzed

CALL_S_MAX = 10.0
# Streams that end only when told to: their first answers are enough.
WATCH_S_MAX = 0.1
METHODS = every_method()
PROTOS = Path(__file__).parents[2] / "protos"


@pytest.mark.parametrize("method", METHODS, ids=[method.full_name.removeprefix("finemesh.") for method in METHODS])
@fuzzed()
@given(data=st.data())
async def test_no_request_makes_a_defect(fuzzed_mesh: FuzzedMesh, method: MethodDescriptor, data: Any) -> None:
    one = encoded(method.input_type)
    contents = data.draw(st.lists(one, min_size=1, max_size=4) if method.client_streaming else one.map(lambda it: [it]))
    service = method.containing_service.full_name
    with fuzzed_mesh.calling(service) as (channel, options):
        try:
            await exchange(channel, method, contents, options)
        except (grpc.aio.AioRpcError, DomainError) as error:
            judge(error, _readable(method, contents))
        health: Any = health_pb2_grpc.HealthStub(channel)
        await health.Check(health_pb2.HealthCheckRequest(), timeout=CALL_S_MAX)


def test_no_method_is_left_out() -> None:
    declared = set()
    for path in PROTOS.rglob("*.proto"):
        package = re.search(r"^package ([\w.]+);", text := path.read_text(encoding="utf-8"), re.MULTILINE)
        assert package is not None
        for service, body in re.findall(r"^service (\w+) \{(.*?)^\}", text, re.MULTILINE | re.DOTALL):
            declared |= {f"{package[1]}.{service}.{name}" for name in re.findall(r"^  rpc (\w+)", body, re.MULTILINE)}
    assert declared == {method.full_name for method in METHODS}


async def exchange(channel: Any, method: MethodDescriptor, contents: Sequence[bytes], options: dict[str, Any]) -> None:
    """Sends bytes and takes all answers; raises what the call ended with."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    endless = method.name.startswith("Watch") or method.name == "Heartbeat"
    options = {**options, "timeout": WATCH_S_MAX if endless else CALL_S_MAX}
    if not method.client_streaming and not method.server_streaming:
        await channel.unary_unary(path)(contents[0], **options)
    elif not method.server_streaming:
        await channel.stream_unary(path)(iter(contents), **options)
    else:
        asked = channel.stream_stream(path) if method.client_streaming else channel.unary_stream(path)
        async for _ in asked(iter(contents) if method.client_streaming else contents[0], **options):
            pass


def _readable(method: MethodDescriptor, contents: Sequence[bytes]) -> str:
    kind = message_factory.GetMessageClass(method.input_type)
    told = []
    for content in contents:
        try:
            told.append(str(kind.FromString(content)) or "(empty)")
        except DecodeError:
            told.append(repr(content))
    return f"{method.full_name}: " + " | ".join(told)
