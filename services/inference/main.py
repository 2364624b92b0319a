"""The inference service, wired by hand in a straight line. An engine's child process imports this file: keep it light."""

from __future__ import annotations

import asyncio
import functools
import sys

from google.protobuf.message import Message

from chassis.bus.connection import connect
from chassis.bus.consumer import Consumer, Handler
from chassis.bus.outbox import Outbox
from chassis.bus.relay import Relay
from chassis.clock import SystemClock
from chassis.db.migrations import migrate
from chassis.db.pool import open_pool
from chassis.ids import SystemIds
from chassis.objects import ObjectStore
from chassis.process import DrainStage, Process, run
from chassis.rpc.channel import open_channel
from chassis.rpc.server import ServerBuilder
from finemesh.artifacts.v1 import model_artifact_service_pb2_grpc
from finemesh.endpoints.v1 import endpoint_service_pb2_grpc
from finemesh.events.v1 import billing_events_pb2, tuning_events_pb2
from finemesh.inference.v1 import inference_service_pb2_grpc
from finemesh.models.v1 import model_service_pb2_grpc
from services.inference.catalogue import Catalogue
from services.inference.config import InferenceSettings
from services.inference.endpoint_keeper import EndpointKeeper
from services.inference.endpoint_service import EndpointService
from services.inference.engine_pool import EnginePool
from services.inference.engines.choice import open_engine
from services.inference.events import Registry
from services.inference.inference_service import InferenceService
from services.inference.metering import Meter
from services.inference.model_service import ModelArtifactService, ModelService
from services.inference.purse import Purse
from services.inference.serving import Serving
from services.inference.store import MIGRATIONS
from services.inference.weights_cache import WeightsCache

PUBLIC_CALLERS = {"gateway"}


async def main(process: Process) -> None:
    settings = process.settings
    assert isinstance(settings, InferenceSettings)
    clock, ids = SystemClock(), SystemIds()

    pool, bus = await asyncio.gather(open_pool(settings), connect(settings))
    process.on_drain(DrainStage.CLOSE_POOL, pool.close)
    process.on_drain(DrainStage.CLOSE_BUS, bus.close)
    await migrate(pool, [MIGRATIONS])

    outbox = Outbox(settings, clock=clock, ids=ids)
    process.spawn("relay", Relay(pool, bus, outbox, clock=clock).run, until=DrainStage.RELEASE_LEASES)
    meter = Meter(pool, outbox, batch_s=settings.usage_batch_s, batch_max=settings.usage_batch_max)
    process.spawn("meter", meter.run, until=DrainStage.FINISH_CALLS)

    objects = ObjectStore(
        settings.artifacts_url, part_bytes=settings.part_bytes, parts_in_flight_max=settings.parts_in_flight_max
    )
    cache = WeightsCache(settings.data_dir / "weights", objects, chunk_bytes_max=settings.chunk_bytes_max)
    engines = EnginePool(
        open_engine=functools.partial(open_engine, settings.engine, stub_token_s=settings.stub_token_s),
        engines_max=settings.engines_max,
        clock=clock,
    )
    process.on_drain(DrainStage.RELEASE_LEASES, engines.close)
    catalogue = Catalogue(pool)
    serving = Serving(engines=engines, cache=cache, meter=meter, settings=settings, clock=clock)

    purse = Purse(pool, poll_s=settings.spending_poll_s, clock=clock)
    await purse.load()
    process.spawn("purse", purse.run)
    scheduler = open_channel(settings, settings.scheduler_address, "scheduler")
    process.on_drain(DrainStage.CLOSE_BUS, scheduler.close)
    keeper = EndpointKeeper(
        pool=pool,
        outbox=outbox,
        catalogue=catalogue,
        serving=serving,
        purse=purse,
        scheduler=scheduler,
        settings=settings,
        clock=clock,
    )
    process.spawn("endpoints", keeper.run)
    registry = Registry(
        outbox=outbox, catalogue=catalogue, serving=serving, warm_up=settings.warm_up, clock=clock, ids=ids
    )
    handlers: dict[type[Message], Handler] = {
        tuning_events_pb2.TuningJobEnded: registry.job_ended,
        billing_events_pb2.CreditStateChanged: purse.credit_changed,
        billing_events_pb2.SpendCapStateChanged: purse.cap_changed,
    }
    consumer = Consumer(pool, bus, "inference", handlers, clock=clock, outbox=outbox)
    process.spawn("consumer", consumer.run)
    process.on_drain(DrainStage.STOP_CONSUMING, consumer.stop)

    server = ServerBuilder(process, settings, trusted_forwarders={"gateway", "scheduler"})
    server.add(
        model_service_pb2_grpc.add_ModelServiceServicer_to_server,
        ModelService(pool=pool, objects=objects, settings=settings, clock=clock, ids=ids),
        "finemesh.models.v1.ModelService",
        PUBLIC_CALLERS,
    )
    server.add(
        endpoint_service_pb2_grpc.add_EndpointServiceServicer_to_server,
        EndpointService(pool=pool, keeper=keeper, purse=purse, settings=settings, clock=clock, ids=ids),
        "finemesh.endpoints.v1.EndpointService",
        PUBLIC_CALLERS,
    )
    server.add(
        inference_service_pb2_grpc.add_InferenceServiceServicer_to_server,
        InferenceService(catalogue=catalogue, serving=serving, purse=purse, pool=pool, settings=settings, ids=ids),
        "finemesh.inference.v1.InferenceService",
        PUBLIC_CALLERS,
    )
    server.add(
        model_artifact_service_pb2_grpc.add_ModelArtifactServiceServicer_to_server,
        ModelArtifactService(catalogue, settings),
        "finemesh.artifacts.v1.ModelArtifactService",
        {"scheduler"},
    )
    await server.start()


if __name__ == "__main__":
    sys.exit(run(main, InferenceSettings()))
