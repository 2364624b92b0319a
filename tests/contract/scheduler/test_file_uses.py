"""The gateway asks which deleted files jobs still read; nobody else may."""

import pytest

from chassis.errors import InvalidArgument, PermissionDenied
from chassis.rpc.channel import open_channel
from finemesh.artifacts.v1 import file_use_service_pb2
from finemesh.artifacts.v1.file_use_service_pb2_grpc import FileUseServiceStub
from tests.contract.scheduler.world import World


async def in_use(world: World, keys: list[str], service: str = "gateway") -> list[str]:
    channel = open_channel(world.make_settings(service), world.target, "scheduler")
    try:
        request = file_use_service_pb2.ListFilesInUseRequest(keys=keys)
        return list((await FileUseServiceStub(channel).ListFilesInUse(request)).keys)
    finally:
        await channel.close()


async def test_only_the_gateway_asks_and_the_list_is_bounded(world: World) -> None:
    assert await in_use(world, ["files/proj_a/file-none"]) == []
    with pytest.raises(InvalidArgument, match="1000"):
        await in_use(world, ["k"] * 1001)
    with pytest.raises(PermissionDenied):
        await in_use(world, [], "inference")
