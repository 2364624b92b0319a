"""The inference service, wired by hand in a straight line.

An engine's child process imports this file: keep it light.
"""

from __future__ import annotations

import asyncio
import functools
import sys
from collections.abc import Callable

import grpc
from google.protobuf.message import Message

from chassis.bus.connection import connect
from chassis.bus.consumer import Consumer, Handler
from chassis.bus.outbox import Outbox
from chassis.bus.relay import Relay
from chassis.clock import Clock, SystemClock
from chassis.db.migrations import migrate
from chassis.db.pool import Pool, open_pool
from chassis.ids import Ids, SystemIds
from chassis.objects.held_folders import HeldFolders
from chassis.objects.object_store import ObjectStore
from chassis.paging import Pages
from chassis.process import DrainStage, Process, run
from chassis.retention import RetentionKeeper
from chassis.rounds import spawn_keeper
from chassis.rpc.channel import open_channel
from chassis.rpc.server import ServerBuilder
from finemesh.artifacts.v1.model_artifact_service_pb2_grpc import add_ModelArtifactServiceServicer_to_server
from finemesh.endpoints.v1.endpoint_service_pb2_grpc import add_EndpointServiceServicer_to_server
from finemesh.events.v1 import billing_events_pb2, tuning_events_pb2
from finemesh.inference.v1.inference_service_pb2_grpc import add_InferenceServiceServicer_to_server
from finemesh.models.v1.model_service_pb2_grpc import add_ModelServiceServicer_to_server
from services.inference.api.endpoint_service import EndpointService
from services.inference.api.forwarding import ForwardingService
from services.inference.api.inference_service import InferenceService
from services.inference.api.model_artifact_service import ModelArtifactService
from services.inference.api.model_service import ModelService
from services.inference.config import MIGRATIONS, InferenceSettings
from services.inference.endpoints.claims import Claims
from services.inference.endpoints.creation import Creation
from services.inference.endpoints.owners import Owners
from services.inference.endpoints.reconciler import EndpointReconciler
from services.inference.endpoints.router import Router
from services.inference.endpoints.transitions import Transitions
from services.inference.engines.choice import open_engine
from services.inference.engines.socket_folders import socket_folders
from services.inference.metering.meter import Meter
from services.inference.models.adapter_import import AdapterImporter
from services.inference.models.base_import import BaseImporter
from services.inference.models.base_uploads import BaseUploads
from services.inference.models.leftovers import Leftovers
from services.inference.models.model_registry import Registry
from services.inference.retention_rules import retention_rules
from services.inference.serving.calls import Serving
from services.inference.serving.device_leases import DeviceLeases
from services.inference.serving.engine_pool import EnginePool
from services.inference.serving.shared_devices import SharedDevices
from services.inference.serving.target import Targets
from services.inference.serving.weights_cache import WeightsCache
from services.inference.spending.credit_keeper import CreditKeeper
from services.inference.spending.first_minutes import FirstMinutes
from services.inference.spending.reservations import Reservations
from services.inference.spending.spend_guard import SpendGuard
from services.inference.spending.token_price import TokenPrices

PUBLIC_CALLERS = {"gateway"}


async def main(process: Process, settings: InferenceSettings) -> None:
    clock, ids = SystemClock(), SystemIds()
    keep = functools.partial(spawn_keeper, process, clock)
    pool, bus = await asyncio.gather(open_pool(settings), connect(settings))
    process.on_drain(DrainStage.CLOSE_POOL, pool.close)
    process.on_drain(DrainStage.CLOSE_BUS, bus.close)
    await migrate(pool, [MIGRATIONS])

    outbox = Outbox(settings, clock=clock, ids=ids)
    keep("retention_keeper", RetentionKeeper(pool, retention_rules(settings), settings, clock=clock).run)
    keep("relay", Relay(pool, bus, outbox, clock=clock).run, until=DrainStage.RELEASE_LEASES)
    meter = Meter(pool, outbox, settings=settings, clock=clock)
    keep("meter", meter.run, until=DrainStage.FINISH_CALLS)

    objects = ObjectStore(
        settings.artifacts_url, part_bytes=settings.part_bytes, parts_in_flight_max=settings.parts_in_flight_max
    )
    cache = WeightsCache(settings, objects)
    await cache.tidy()
    scheduler = open_channel(settings, settings.scheduler_agents_address, "scheduler")
    process.on_drain(DrainStage.CLOSE_BUS, scheduler.close)
    opener = functools.partial(open_engine, settings.engine, stub_token_s=settings.stub_token_s)
    claims = Claims(pool, owner=ids.new("inf_"), settings=settings, clock=clock)
    devices = DeviceLeases(scheduler, settings=settings, clock=clock)
    shared = SharedDevices(devices, holder=claims.owner, settings=settings, clock=clock)
    engines = EnginePool(open_engine=opener, engines_max=settings.engines_max, clock=clock, devices=shared)
    process.on_drain(DrainStage.RELEASE_LEASES, engines.close)
    billing = open_billing(process, settings)
    reservations = open_reservations(process, keep, billing, settings, clock, ids)
    first_minutes = FirstMinutes(billing, settings)
    serving = Serving(Targets(pool), engines, cache, meter, reservations, settings=settings, clock=clock)
    spend_guard = SpendGuard(pool, poll_s=settings.spending_poll_s, clock=clock)
    await spend_guard.load()
    keep("spend_guard", spend_guard.run)
    owners = Owners(pool, settings=settings, clock=clock)
    keep("owners", owners.run, until=DrainStage.FINISH_CALLS)
    process.on_drain(DrainStage.CLOSE_BUS, owners.close)
    router, transitions = Router(pool, serving, owner=claims.owner), Transitions(outbox, clock)
    reconciler = EndpointReconciler(
        pool, outbox, transitions, router, serving, spend_guard, claims, devices, settings=settings, clock=clock
    )
    process.on_drain(DrainStage.NOT_SERVING, reconciler.stop_taking)
    process.on_drain(DrainStage.RELEASE_LEASES, reconciler.hand_over)
    registry = Registry(outbox, warm_up=serving.warm_up_model if settings.warm_up else None, ids=ids)
    consumer = Consumer(pool, bus, "inference", handlers(registry, spend_guard), clock=clock, outbox=outbox)
    keep("consumer", consumer.run)
    process.on_drain(DrainStage.STOP_CONSUMING, consumer.stop)

    importer, adapters = open_importers(keep, pool, objects, registry, settings, clock, ids)
    creation = Creation(
        pool, transitions, spend_guard, first_minutes, endpoints_max=settings.endpoints_max, clock=clock, ids=ids
    )
    local = InferenceService(pool, router, serving, spend_guard, settings=settings, ids=ids)
    pages = Pages(settings.page_token_key)
    server = ServerBuilder(process, settings, trusted_forwarders={"gateway", "scheduler", settings.service_name})
    bus.report_to(server.component)
    add_services(
        server,
        models=ModelService(
            pool, registry, importer, adapters, objects, pages, chunk_bytes_max=settings.chunk_bytes_max, clock=clock
        ),
        endpoints=EndpointService(
            pool, creation, transitions, reconciler, spend_guard, first_minutes, pages, clock=clock
        ),
        inference=ForwardingService(local, owners, own_name=settings.service_name),
        artifacts=ModelArtifactService(pool, adapter_rank_max=settings.adapter_rank_max),
    )
    await server.start()
    claims.address = server.address
    keep("endpoint_reconciler", reconciler.run, until=DrainStage.FINISH_CALLS)


def open_importers(
    keep: Callable[..., None],
    pool: Pool,
    objects: ObjectStore,
    registry: Registry,
    settings: InferenceSettings,
    clock: Clock,
    ids: Ids,
) -> tuple[BaseImporter, AdapterImporter]:
    """What makes models of uploads, and what removes the leftovers of those that broke off."""
    uploads = BaseUploads(pool, objects, settings=settings, ids=ids)
    imports = HeldFolders(settings.data_dir / "imports")
    leftovers = Leftovers(uploads, [imports, socket_folders()], interval_s=settings.leftover_interval_s, clock=clock)
    keep("leftovers", leftovers.run)
    return (
        BaseImporter(pool, objects, uploads, imports, settings=settings, clock=clock, ids=ids),
        AdapterImporter(pool, objects, uploads, imports, registry, settings=settings, clock=clock, ids=ids),
    )


def open_billing(process: Process, settings: InferenceSettings) -> grpc.aio.Channel:
    """Billing as inference calls it."""
    billing = open_channel(settings, settings.billing_address, "billing")
    process.on_drain(DrainStage.CLOSE_BUS, billing.close)
    return billing


def open_reservations(
    process: Process,
    keep: Callable[..., None],
    billing: grpc.aio.Channel,
    settings: InferenceSettings,
    clock: Clock,
    ids: Ids,
) -> Reservations:
    """What calls reserve from leases of credit, which are kept alive and in the end given back."""
    credit = CreditKeeper(billing, settings=settings, clock=clock, ids=ids)
    keep("credit_keeper", credit.run, until=DrainStage.FINISH_CALLS)
    process.on_drain(DrainStage.RELEASE_LEASES, credit.close)
    prices = TokenPrices(billing, deadline_s=settings.credit_wait_s_max, clock=clock)
    return Reservations(credit, prices, part_tokens=settings.credit_part_tokens)


def handlers(registry: Registry, spend_guard: SpendGuard) -> dict[type[Message], Handler]:
    """What this service hears of others."""
    return {
        tuning_events_pb2.TuningJobEnded: registry.job_ended,
        billing_events_pb2.CreditStateChanged: spend_guard.credit_changed,
        billing_events_pb2.SpendCapStateChanged: spend_guard.cap_changed,
    }


def add_services(
    server: ServerBuilder,
    *,
    models: ModelService,
    endpoints: EndpointService,
    inference: ForwardingService,
    artifacts: ModelArtifactService,
) -> None:
    """What this process serves, and to whom."""
    server.add(add_ModelServiceServicer_to_server, models, "finemesh.models.v1.ModelService", PUBLIC_CALLERS)
    server.add(
        add_EndpointServiceServicer_to_server, endpoints, "finemesh.endpoints.v1.EndpointService", PUBLIC_CALLERS
    )
    server.add(
        add_InferenceServiceServicer_to_server,
        inference,
        "finemesh.inference.v1.InferenceService",
        # Other replicas pass calls on to the one that has the endpoint.
        PUBLIC_CALLERS | {"inference"},
    )
    server.add(
        add_ModelArtifactServiceServicer_to_server,
        artifacts,
        "finemesh.artifacts.v1.ModelArtifactService",
        {"scheduler", "gateway"},
    )


def start() -> int:
    settings = InferenceSettings()
    return run(lambda process: main(process, settings), settings)


if __name__ == "__main__":
    sys.exit(start())
