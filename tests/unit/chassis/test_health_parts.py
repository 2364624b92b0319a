"""A part of a server that is not well is seen by its name, and takes nobody's calls away."""

from pathlib import Path

from grpc_health.v1 import health_pb2, health_pb2_grpc

from chassis.rpc.channel import open_channel
from chassis.rpc.server import ServerBuilder
from tests.harness.living import living
from tests.unit.chassis.echo import settings_of

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


async def test_a_part_says_how_it_is_and_the_server_goes_on(tls_dir: Path) -> None:
    settings = settings_of("back", tls_dir)
    async with living(settings) as process:
        builder = ServerBuilder(process, settings)
        tell = builder.component("finemesh.bus.streams")
        await builder.start()
        async with open_channel(settings_of("front", tls_dir), f"127.0.0.1:{builder.port}", "back") as channel:
            check = health_pb2_grpc.HealthStub(channel).Check

            async def answers() -> list[int]:
                names = ("", "finemesh.bus.streams")
                return [(await check(health_pb2.HealthCheckRequest(service=name))).status for name in names]

            assert await answers() == [SERVING, SERVING]
            await tell(False)
            assert await answers() == [SERVING, NOT_SERVING]
            await tell(True)
            assert await answers() == [SERVING, SERVING]
