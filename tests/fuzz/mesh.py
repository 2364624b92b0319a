"""The real services in this process, each with a database of its own, as their callers reach them."""

import contextlib
import functools
import hashlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from chassis.identity import Caller, acting_as
from chassis.rpc.channel import open_channel
from chassis.settings import ChassisSettings
from deploy.local.ports import PortClaims
from finemesh.billing.v1 import billing_service_pb2, billing_service_pb2_grpc
from finemesh.endpoints.v1 import endpoint_service_pb2, endpoint_service_pb2_grpc
from finemesh.files.v1 import file_service_pb2, file_service_pb2_grpc
from finemesh.identity.v1 import identity_service_pb2, identity_service_pb2_grpc
from finemesh.models.v1 import model_service_pb2, model_service_pb2_grpc
from finemesh.tuning.v1 import tuning_job_pb2, tuning_service_pb2, tuning_service_pb2_grpc
from services.billing.config import BillingSettings
from services.billing.main import main as billing_main
from services.gateway.config import GatewaySettings
from services.gateway.main import main as gateway_main
from services.inference.config import InferenceSettings
from services.inference.main import main as inference_main
from services.scheduler.config import SchedulerSettings
from services.scheduler.main import main as scheduler_main
from services.trainer.config import TrainerSettings
from services.trainer.main import main as trainer_main
from tests.harness.base_model import write_base
from tests.harness.books import write_books
from tests.harness.fixtures import node_tls_dir
from tests.harness.living import living
from tests.harness.organizations import Tenant, add_organization
from tests.harness.polling import eventually
from tests.harness.servers import NatsServer, PostgresServer

PORTS = ("gateway", "public", "http", "scheduler", "agents", "billing", "inference", "trainer")
BASE = "finemesh/tiny"
NODE = "local-0"
_SECRET = "0123456789abcdef" * 3
CONVERSATION = b'{"messages":[{"role":"user","content":"Hi"},{"role":"assistant","content":"Ho"}]}\n'
# Inner services: the port that serves them, the certificate it shows, and the one that their callers show.
INNER = {
    "finemesh.artifacts.v1.FileArtifactService": ("gateway", "gateway", "scheduler"),
    "finemesh.artifacts.v1.ModelArtifactService": ("inference", "inference", "scheduler"),
    "finemesh.organizations.v1.OrganizationService": ("gateway", "gateway", "billing"),
    "finemesh.artifacts.v1.FileUseService": ("scheduler", "scheduler", "gateway"),
    "finemesh.allocations.v1.AllocationService": ("agents", "scheduler", "inference"),
    "finemesh.nodes.v1.NodeService": ("agents", "scheduler", "trainer"),
    "finemesh.holds.v1.HoldService": ("billing", "billing", "scheduler"),
    "finemesh.credit.v1.CreditLeaseService": ("billing", "billing", "inference"),
    "finemesh.datasets.v1.DatasetService": ("trainer", "trainer", "scheduler"),
}


@dataclass(kw_only=True, repr=False)
class FuzzedMesh:
    """`names` are texts that mean something here: ids and resource names of what exists."""

    ports: dict[str, int]
    tls_dir: Path
    tenant: Tenant
    public: grpc.aio.Channel
    nats_url: str
    database_urls: dict[str, str]
    channels: dict[str, grpc.aio.Channel] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    @property
    def bearer(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.tenant.api_key}"),)

    @contextlib.contextmanager
    def calling(self, service: str) -> Iterator[tuple[Any, dict[str, Any]]]:
        """The channel by which `service`, a full name, is reached, and the options of a call on it."""
        if service not in INNER:
            yield self.public, {"metadata": self.bearer}
            return
        tenant = self.tenant
        caller = Caller(service="", tenant=tenant.project_id, account=tenant.organization_id, subject=tenant.key_id)
        with acting_as(caller):
            yield self.channels[service], {}


@contextlib.asynccontextmanager
async def running_mesh(
    postgres: PostgresServer, nats: NatsServer, tls_dir: Path, folder: Path
) -> AsyncIterator[FuzzedMesh]:
    claims = PortClaims()
    ports = claims.pick(PORTS, {})
    at = {name: f"127.0.0.1:{port}" for name, port in ports.items()}
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(claims.release)
        urls = {
            name: await stack.enter_async_context(postgres.scratch())
            for name in ("gateway", "scheduler", "billing", "inference")
        }
        given: dict[str, Any] = {
            "nats_url": nats.url,
            "tls_dir": tls_dir,
            "artifacts_url": (folder / "artifacts").as_uri(),
            "drain_grace_s": 2.0,
            "page_token_key": _SECRET,
            "scheduler_address": at["scheduler"],
            "scheduler_agents_address": at["agents"],
            "billing_address": at["billing"],
            "inference_address": at["inference"],
            "gateway_address": at["gateway"],
        }

        async def serve(main: Any, settings: Any) -> None:
            await stack.enter_async_context(living(settings, functools.partial(_main, main, settings)))

        own = {name: {**given, "database_url": urls[name], "listen_address": at[name]} for name in urls}
        await serve(
            billing_main,
            BillingSettings(price_books_dir=write_books(folder / "books"), **own["billing"]),
        )
        await serve(
            scheduler_main, SchedulerSettings(agents_address=at["agents"], secrets_key=_SECRET, **own["scheduler"])
        )
        await serve(inference_main, InferenceSettings(data_dir=folder / "inference", engine="stub", **own["inference"]))
        doors: dict[str, Any] = {"public_address": at["public"], "http_address": at["http"]}
        await serve(gateway_main, GatewaySettings(**doors, **own["gateway"]))
        await serve(trainer_main, _trainer_settings(given, at, tls_dir, folder))
        public = grpc.aio.insecure_channel(at["public"])
        stack.push_async_callback(public.close)
        tenant = await add_organization(urls["gateway"], "acme")
        mesh = FuzzedMesh(
            ports=ports, tls_dir=tls_dir, tenant=tenant, public=public, nats_url=nats.url, database_urls=urls
        )
        for service, (port, name, caller) in INNER.items():
            certificates = node_tls_dir(tls_dir, NODE) if caller == "trainer" else tls_dir
            channel = open_channel(ChassisSettings(service_name=caller, tls_dir=certificates), at[port], name)
            stack.push_async_callback(channel.close)
            mesh.channels[service] = channel
        await _furnish(mesh, folder)
        yield mesh


async def _main(main: Any, settings: Any, process: Any) -> None:
    await main(process, settings)


def _trainer_settings(given: dict[str, Any], at: dict[str, str], tls_dir: Path, folder: Path) -> TrainerSettings:
    """It finds no scheduler, so that no job runs here; it serves all the same."""
    shared = {**given, "scheduler_agents_address": "127.0.0.1:9", "tls_dir": node_tls_dir(tls_dir, NODE)}
    return TrainerSettings(
        node_name=NODE,
        listen_address=at["trainer"],
        data_dir=folder / "trainer",
        warm_memory_bytes_max=0,
        child_module="tests.harness.fake_child",
        **shared,
    )


async def _furnish(mesh: FuzzedMesh, folder: Path) -> None:
    """One of each thing that a request may name."""
    options: Any = {"metadata": mesh.bearer, "timeout": 60}
    billing: Any = billing_service_pb2_grpc.BillingServiceStub(mesh.public)
    await billing.TopUp(billing_service_pb2.TopUpRequest(amount_nanos_usd=10**12, request_id="first"), **options)
    models: Any = model_service_pb2_grpc.ModelServiceStub(mesh.public)
    await models.ImportBaseModel(_import_parts(_base_folder(folder / "base")), **options)
    files: Any = file_service_pb2_grpc.FileServiceStub(mesh.public)
    uploaded = await files.UploadFile(_upload_parts(), **options)
    jobs: Any = tuning_service_pb2_grpc.TuningServiceStub(mesh.public)
    spec = tuning_job_pb2.TuningSpec(base_model=BASE, training_file=uploaded.file.name)
    created = await jobs.CreateTuningJob(tuning_service_pb2.CreateTuningJobRequest(spec=spec), **options)
    endpoints: Any = endpoint_service_pb2_grpc.EndpointServiceStub(mesh.public)
    wanted = endpoint_service_pb2.CreateEndpointRequest(endpoint_name="mine", model=BASE)
    project = f"projects/{mesh.tenant.project_id}"
    # Not the one that the fuzz calls with: it may be revoked.
    identities: Any = identity_service_pb2_grpc.IdentityServiceStub(mesh.public)
    made = await identities.CreateApiKey(identity_service_pb2.CreateApiKeyRequest(display_name="second"), **options)
    mesh.names |= {
        "base_model": BASE,
        "model": BASE,
        "model_id": BASE,
        "baseModel": f"baseModels/{BASE}",
        "parent": project,
        "project": project,
        "project_id": mesh.tenant.project_id,
        "organization": f"organizations/{mesh.tenant.organization_id}",
        "organization_id": mesh.tenant.organization_id,
        "api_key": made.key.name,
        "api_key_id": made.key.name.rpartition("/")[2],
        "file": uploaded.file.name,
        "training_file": uploaded.file.name,
        "validation_file": uploaded.file.name,
        "tuning_job": created.tuning_job.name,
        "resource": created.tuning_job.name,
        "endpoint": f"{project}/endpoints/mine",
        "node": NODE,
        "billing_month": "2026-11",
        "role": "user",
        "currency": "usd",
    }
    with contextlib.suppress(grpc.aio.AioRpcError):
        await endpoints.CreateEndpoint(wanted, **options)
    # Health of the peers' own connections: the first calls must not be refused for want of one.
    await eventually(lambda: models.ListBaseModels(model_service_pb2.ListBaseModelsRequest(), **options))


def _base_folder(folder: Path) -> Path:
    folder.mkdir()
    write_base(folder)
    return folder


async def _import_parts(folder: Path) -> AsyncIterator[model_service_pb2.ImportBaseModelRequest]:
    yield model_service_pb2.ImportBaseModelRequest(header=model_service_pb2.ImportBaseModelHeader(model_id=BASE))
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        described = model_service_pb2.ImportBaseModelFile(
            path=path.name, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest()
        )
        yield model_service_pb2.ImportBaseModelRequest(file=described)
        yield model_service_pb2.ImportBaseModelRequest(chunk=content)


async def _upload_parts() -> AsyncIterator[file_service_pb2.UploadFileRequest]:
    yield file_service_pb2.UploadFileRequest(header=file_service_pb2.UploadFileHeader(display_name="mine.jsonl"))
    yield file_service_pb2.UploadFileRequest(chunk=CONVERSATION)
