"""Wires the gateway in a straight line: database, artifact store, peers, the mesh's door and the two public doors."""

import functools
import sys

import grpc

from chassis.clock import SystemClock
from chassis.db.migrations import migrate
from chassis.db.pool import Pool, open_pool
from chassis.heap import share_heaps
from chassis.ids import SystemIds
from chassis.objects.object_store import ObjectStore
from chassis.process import DrainStage, Process, run
from chassis.retention import RetentionKeeper
from chassis.rounds import spawn_keeper
from chassis.rpc.channel import open_channel
from chassis.rpc.server import ServerBuilder
from finemesh.artifacts.v1.file_artifact_service_pb2_grpc import add_FileArtifactServiceServicer_to_server
from finemesh.artifacts.v1.file_use_service_pb2_grpc import FileUseServiceStub
from finemesh.artifacts.v1.model_artifact_service_pb2_grpc import ModelArtifactServiceStub
from finemesh.billing.v1 import billing_service_pb2, budget_service_pb2, invoice_service_pb2, ledger_service_pb2
from finemesh.endpoints.v1 import endpoint_service_pb2
from finemesh.files.v1.file_service_pb2_grpc import add_FileServiceServicer_to_server
from finemesh.identity.v1.identity_service_pb2_grpc import add_IdentityServiceServicer_to_server
from finemesh.inference.v1 import inference_service_pb2
from finemesh.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from finemesh.models.v1 import model_service_pb2
from finemesh.organizations.v1.organization_service_pb2_grpc import add_OrganizationServiceServicer_to_server
from finemesh.tuning.v1 import tuning_service_pb2
from services.gateway.api.file_artifact_service import FileArtifactService
from services.gateway.api.file_service import FileService
from services.gateway.api.identity_service import IdentityService
from services.gateway.api.organization_service import OrganizationService
from services.gateway.api.proxy import Proxy
from services.gateway.config import MIGRATIONS, GatewaySettings
from services.gateway.files.artifact_gc import ArtifactCollector
from services.gateway.files.file_uses import FileUses
from services.gateway.files.uploads import Uploads
from services.gateway.http.app import HttpApp
from services.gateway.http.http_server import start_http
from services.gateway.identity.authenticator import Authenticator
from services.gateway.identity.key_watch import KeyWatch
from services.gateway.identity.namespaces import Namespaces
from services.gateway.identity.rate_limit import RateLimiter
from services.gateway.identity.store import KeyFinder
from services.gateway.requests.audit import AuditLog
from services.gateway.retention_rules import retention_rules

HEAPS_MAX = 2


async def main(process: Process, settings: GatewaySettings) -> None:
    clock = SystemClock()
    ids = SystemIds(clock)
    pool = await open_pool(settings)
    process.on_drain(DrainStage.CLOSE_POOL, pool.close)
    await migrate(pool, [MIGRATIONS])
    artifacts = ObjectStore(
        settings.artifacts_url,
        part_bytes=settings.upload_part_bytes,
        parts_in_flight_max=settings.upload_parts_in_flight_max,
    )
    keep = functools.partial(spawn_keeper, process, clock)
    keep("retention_keeper", RetentionKeeper(pool, retention_rules(settings), settings, clock=clock).run)

    limiter = RateLimiter(
        rate_per_s=settings.rate_calls_per_s, burst=settings.rate_burst_max, keys_max=settings.rate_keys_max
    )
    keys = KeyFinder(pool)
    authenticator = Authenticator(
        keys,
        limiter,
        clock,
        cache_s=settings.key_cache_s,
        cache_size_max=settings.key_cache_size_max,
        lookups_max=settings.key_lookups_max,
    )
    key_watch = KeyWatch(keys.revoked, clock, pause_s=settings.stream_key_check_s)
    keep("key_watch", key_watch.run)
    scheduler = open_channel(settings, settings.scheduler_address, "scheduler")
    billing = open_channel(settings, settings.billing_address, "billing")
    inference = open_channel(settings, settings.inference_address, "inference")
    for channel in (scheduler, billing, inference):
        process.on_drain(DrainStage.RELEASE_LEASES, channel.close)

    collector = ArtifactCollector(pool, artifacts, FileUses(FileUseServiceStub(scheduler)), clock, settings)
    keep("artifact_gc", collector.run)
    uploads = Uploads(pool, artifacts, collector, clock, ids, settings)
    files = FileService(pool, artifacts, uploads, collector, key_watch, clock, settings)
    namespaces = Namespaces(pool, ModelArtifactServiceStub(inference), clock, settings)
    keep("namespaces", namespaces.run)
    identities = IdentityService(pool, authenticator, key_watch, namespaces, clock, ids, settings)
    proxy = open_proxy(key_watch, scheduler=scheduler, billing=billing, inference=inference)
    mesh = mesh_server(process, settings, pool)
    public = ServerBuilder(
        process,
        settings,
        public=True,
        authenticate=authenticator,
        witnessing=AuditLog(pool, clock).witnessing,
        listen_address=settings.public_address,
        port_file=settings.public_port_file,
    )
    public.add(add_FileServiceServicer_to_server, files, "finemesh.files.v1.FileService", allow=())
    public.add(add_IdentityServiceServicer_to_server, identities, "finemesh.identity.v1.IdentityService", allow=())
    public.add_generic(proxy, endless=proxy.endless)
    public.announce(*proxy.service_names)
    edge = HttpApp(InferenceServiceStub(inference), authenticator, key_watch, clock, settings)
    process.on_drain(DrainStage.NOT_SERVING, edge.drain)

    await public.start()
    await start_http(process, edge.asgi, clock, settings)
    # Last: whoever asks this door whether the gateway is healthy learns that the public doors are open.
    await mesh.start()


def mesh_server(process: Process, settings: GatewaySettings, pool: Pool) -> ServerBuilder:
    """The door for the other services."""
    mesh = ServerBuilder(process, settings, trusted_forwarders={"scheduler"})
    mesh.add(
        add_FileArtifactServiceServicer_to_server,
        FileArtifactService(pool),
        "finemesh.artifacts.v1.FileArtifactService",
        allow={"scheduler", "trainer"},
    )
    mesh.add(
        add_OrganizationServiceServicer_to_server,
        OrganizationService(pool),
        "finemesh.organizations.v1.OrganizationService",
        allow={"billing"},
    )
    return mesh


def open_proxy(
    key_watch: KeyWatch, *, scheduler: grpc.aio.Channel, billing: grpc.aio.Channel, inference: grpc.aio.Channel
) -> Proxy:
    """Which services are forwarded, and where to."""
    return Proxy(
        {
            tuning_service_pb2.DESCRIPTOR.services_by_name["TuningService"]: scheduler,
            model_service_pb2.DESCRIPTOR.services_by_name["ModelService"]: inference,
            endpoint_service_pb2.DESCRIPTOR.services_by_name["EndpointService"]: inference,
            inference_service_pb2.DESCRIPTOR.services_by_name["InferenceService"]: inference,
            billing_service_pb2.DESCRIPTOR.services_by_name["BillingService"]: billing,
            budget_service_pb2.DESCRIPTOR.services_by_name["BudgetService"]: billing,
            invoice_service_pb2.DESCRIPTOR.services_by_name["InvoiceService"]: billing,
            ledger_service_pb2.DESCRIPTOR.services_by_name["LedgerService"]: billing,
        },
        key_watch,
    )


def start() -> int:
    share_heaps(HEAPS_MAX)
    settings = GatewaySettings()
    return run(lambda process: main(process, settings), settings)


if __name__ == "__main__":
    sys.exit(start())
