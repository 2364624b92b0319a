"""A gateway in this process over real Postgres and real gRPC, before a scheduler and an inference service of ours."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from chassis import errors
from chassis.clock import SystemClock
from chassis.db.migrations import migrate
from chassis.db.pool import Pool, open_pool
from chassis.identity import Caller, current_caller
from chassis.ids import SystemIds
from chassis.process import Process
from chassis.rpc.channel import open_channel
from chassis.rpc.request_stream import whole
from chassis.rpc.server import ServerBuilder
from chassis.settings import ChassisSettings
from finemesh.artifacts.v1 import file_use_service_pb2, model_artifact_service_pb2
from finemesh.artifacts.v1.file_artifact_service_pb2_grpc import FileArtifactServiceStub
from finemesh.artifacts.v1.file_use_service_pb2_grpc import (
    FileUseServiceServicer,
    add_FileUseServiceServicer_to_server,
)
from finemesh.artifacts.v1.model_artifact_service_pb2_grpc import (
    ModelArtifactServiceServicer,
    add_ModelArtifactServiceServicer_to_server,
)
from finemesh.files.v1 import file_pb2, file_service_pb2
from finemesh.files.v1.file_service_pb2_grpc import FileServiceStub
from finemesh.identity.v1.identity_service_pb2_grpc import IdentityServiceStub
from finemesh.inference.v1 import generation_pb2, inference_service_pb2
from finemesh.inference.v1.inference_service_pb2_grpc import (
    InferenceServiceServicer,
    InferenceServiceStub,
    add_InferenceServiceServicer_to_server,
)
from finemesh.models.v1 import model_service_pb2
from finemesh.models.v1.model_service_pb2_grpc import (
    ModelServiceServicer,
    ModelServiceStub,
    add_ModelServiceServicer_to_server,
)
from finemesh.tuning.v1 import tuning_job_pb2, tuning_service_pb2
from finemesh.tuning.v1.tuning_service_pb2_grpc import (
    TuningServiceServicer,
    TuningServiceStub,
    add_TuningServiceServicer_to_server,
)
from services.gateway.config import MIGRATIONS, GatewaySettings
from services.gateway.identity import keys
from services.gateway.identity.domain import ROLES, ApiKey, Organization, Project
from services.gateway.identity.store import IdentityStore
from services.gateway.main import main
from tests.harness.living import living
from tests.harness.polling import eventually

if TYPE_CHECKING:
    from finemesh.artifacts.v1.file_artifact_service_pb2_grpc import FileArtifactServiceAsyncStub
    from finemesh.files.v1.file_service_pb2_grpc import FileServiceAsyncStub
    from finemesh.identity.v1.identity_service_pb2_grpc import IdentityServiceAsyncStub
    from finemesh.inference.v1.inference_service_pb2_grpc import InferenceServiceAsyncStub
    from finemesh.models.v1.model_service_pb2_grpc import ModelServiceAsyncStub
    from finemesh.tuning.v1.tuning_service_pb2_grpc import TuningServiceAsyncStub

CONVERSATION = b'{"messages":[{"role":"user","content":"Hi"},{"role":"assistant","content":"Ho"}]}\n'


class Tuning(TuningServiceServicer):
    """Answers with who called, and quotes as told; `failure` makes every call fail; a watch never ends by itself.

    A cancel waits for `gate`, and finds the job `ft-1` alone.
    """

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.caller: Caller | None = None
        self.remaining_s = 0.0
        self.written = 0
        self.watches_ended = 0
        self.watch_cancelled = asyncio.Event()
        self.payload = b""
        self.quoted = tuning_job_pb2.TuningSpec()
        self.quote = tuning_service_pb2.QuoteTuningJobResponse()
        self.began, self.gate = asyncio.Event(), asyncio.Event()
        self.gate.set()

    async def CreateTuningJob(
        self, request: tuning_service_pb2.CreateTuningJobRequest, context: Any
    ) -> tuning_service_pb2.CreateTuningJobResponse:
        job = tuning_job_pb2.TuningJob(name=f"projects/{current_caller().tenant}/tuningJobs/ft-1")
        return tuning_service_pb2.CreateTuningJobResponse(tuning_job=job)

    async def CancelTuningJob(
        self, request: tuning_service_pb2.CancelTuningJobRequest, context: Any
    ) -> tuning_service_pb2.CancelTuningJobResponse:
        self.began.set()
        await self.gate.wait()
        if not request.name.endswith("/ft-1"):
            raise errors.NotFound("NOT_FOUND", f"there is no job {request.name[:100]}")
        return tuning_service_pb2.CancelTuningJobResponse(tuning_job=tuning_job_pb2.TuningJob(name=request.name))

    async def QuoteTuningJob(
        self, request: tuning_service_pb2.QuoteTuningJobRequest, context: Any
    ) -> tuning_service_pb2.QuoteTuningJobResponse:
        self.quoted = request.spec
        return self.quote

    async def GetTuningJob(
        self, request: tuning_service_pb2.GetTuningJobRequest, context: Any
    ) -> tuning_service_pb2.GetTuningJobResponse:
        self.caller = current_caller()
        self.remaining_s = context.time_remaining()
        if self.failure is not None:
            raise self.failure
        return tuning_service_pb2.GetTuningJobResponse(tuning_job=tuning_job_pb2.TuningJob(name=request.name))

    async def WatchTuningJob(
        self, request: tuning_service_pb2.WatchTuningJobRequest, context: Any
    ) -> AsyncIterator[tuning_service_pb2.WatchTuningJobResponse]:
        answer = tuning_service_pb2.WatchTuningJobResponse()
        # An unknown field is as good as any payload: the proxy must not care.
        answer.MergeFromString(b"\xfa\x7f" + _varint(len(self.payload)) + self.payload)
        try:
            while True:
                yield answer
                self.written += 1
        except (asyncio.CancelledError, GeneratorExit):
            self.watch_cancelled.set()
            raise
        finally:
            self.watches_ended += 1


class Models(ModelServiceServicer):
    """Counts what an import brings and notes how it ended."""

    def __init__(self) -> None:
        self.ends: asyncio.Queue[str] = asyncio.Queue()
        self.received = asyncio.Semaphore(0)

    async def ImportBaseModel(self, request_iterator: Any, context: Any) -> model_service_pb2.ImportBaseModelResponse:
        try:
            async for _ in whole(request_iterator, context):
                self.received.release()
        except (asyncio.CancelledError, errors.Cancelled):
            self.ends.put_nowait("cancelled")
            raise
        self.ends.put_nowait("complete")
        return model_service_pb2.ImportBaseModelResponse()


class Names(ModelArtifactServiceServicer):
    """Notes the namespaces that projects take; `bases` are those of base models."""

    def __init__(self) -> None:
        self.bases = {"llamas"}
        self.claimed: list[str] = []

    async def ClaimProjectNamespace(
        self, request: model_artifact_service_pb2.ClaimProjectNamespaceRequest, context: Any
    ) -> model_artifact_service_pb2.ClaimProjectNamespaceResponse:
        if request.slug in self.bases:
            raise errors.AlreadyExists("ALREADY_EXISTS", f"{request.slug} is the namespace of base models")
        self.claimed.append(request.slug)
        return model_artifact_service_pb2.ClaimProjectNamespaceResponse()


class FileUse(FileUseServiceServicer):
    """Says of the keys in `used` that jobs read them, and notes what it was asked."""

    def __init__(self) -> None:
        self.used: set[str] = set()
        self.asked: set[str] = set()

    async def ListFilesInUse(
        self, request: file_use_service_pb2.ListFilesInUseRequest, context: Any
    ) -> file_use_service_pb2.ListFilesInUseResponse:
        self.asked |= set(request.keys)
        return file_use_service_pb2.ListFilesInUseResponse(keys=self.used & set(request.keys))


class Inference(InferenceServiceServicer):
    """A scripted engine: answers with `words`; waits for `gate` after the first one. `whole` and `parts` are answers of
    another kind, where a test has them."""

    def __init__(self) -> None:
        self.words = ["Hello", " world"]
        self.whole: Any = None
        self.parts: list[Any] | None = None
        self.failure: Exception | None = None
        self.failure_later: Exception | None = None
        self.request: Any = None
        self.caller: Caller | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.started = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def Chat(
        self, request: inference_service_pb2.ChatRequest, context: Any
    ) -> inference_service_pb2.ChatResponse:
        await self._begin(request)
        if self.whole is not None:
            return self.whole
        return inference_service_pb2.ChatResponse(
            generation_id="gen-1",
            model=request.model,
            choices=[
                inference_service_pb2.ChatChoice(
                    message=generation_pb2.ChatMessage(role="assistant", content="".join(self.words)),
                    finish_reason=generation_pb2.FINISH_REASON_LENGTH,
                )
            ],
            usage=generation_pb2.TokenUsage(input_tokens=5, output_tokens=2),
            revision="rv_1",
        )

    async def StreamChat(
        self, request: inference_service_pb2.StreamChatRequest, context: Any
    ) -> AsyncIterator[inference_service_pb2.StreamChatResponse]:
        if self.parts is not None:
            self.request, self.caller = request, current_caller()
            for part in self.parts:
                yield part
            return
        try:
            for index, word in enumerate(self.words):
                if index == 1:
                    await self.gate.wait()
                    if self.failure_later is not None:
                        raise self.failure_later
                elif index == 0:
                    self.request, self.caller = request, current_caller()
                    if self.failure is not None:
                        raise self.failure
                yield inference_service_pb2.StreamChatResponse(generation_id="gen-1", text_delta=word, revision="rv_1")
            yield inference_service_pb2.StreamChatResponse(
                generation_id="gen-1",
                finish_reason=generation_pb2.FINISH_REASON_STOP,
                usage=generation_pb2.TokenUsage(input_tokens=5, output_tokens=len(self.words)),
            )
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise

    async def Complete(
        self, request: inference_service_pb2.CompleteRequest, context: Any
    ) -> inference_service_pb2.CompleteResponse:
        await self._begin(request)
        assert self.whole is not None
        return self.whole

    async def StreamComplete(
        self, request: inference_service_pb2.StreamCompleteRequest, context: Any
    ) -> AsyncIterator[inference_service_pb2.StreamCompleteResponse]:
        self.request, self.caller = request, current_caller()
        if self.failure is not None:
            raise self.failure
        assert self.parts is not None
        try:
            for index, part in enumerate(self.parts):
                if index == 1:
                    await self.gate.wait()
                    if self.failure_later is not None:
                        raise self.failure_later
                yield part
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise

    async def ListServedModels(
        self, request: inference_service_pb2.ListServedModelsRequest, context: Any
    ) -> inference_service_pb2.ListServedModelsResponse:
        self.caller = current_caller()
        return inference_service_pb2.ListServedModelsResponse(
            models=[
                inference_service_pb2.ServedModel(
                    model_id="finemesh/demo-llama", kind="base", create_time_s=1_900_000_000, owner="finemesh"
                ),
                inference_service_pb2.ServedModel(
                    model_id="acme/reader", kind="tuned", create_time_s=1_900_000_001, owner="acme"
                ),
            ]
        )

    async def _begin(self, request: Any) -> None:
        self.request, self.caller = request, current_caller()
        self.started.set()
        if self.failure is not None:
            raise self.failure
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


@dataclass(kw_only=True)
class Tenant:
    organization_id: str
    project_id: str
    secret: str


@dataclass(kw_only=True)
class World:
    settings: GatewaySettings
    process: Process
    pool: Pool
    tuning: Tuning
    models: Models
    names: Names
    inference: Inference
    file_use: FileUse
    artifacts: Path
    channel: grpc.aio.Channel
    mesh: grpc.aio.Channel
    acme: Tenant
    other: Tenant
    public_port: int
    http_port: int

    @property
    def files(self) -> "FileServiceAsyncStub":
        return FileServiceStub(self.channel)

    @property
    def identities(self) -> "IdentityServiceAsyncStub":
        return IdentityServiceStub(self.channel)

    @property
    def jobs(self) -> "TuningServiceAsyncStub":
        return TuningServiceStub(self.channel)

    @property
    def base_models(self) -> "ModelServiceAsyncStub":
        return ModelServiceStub(self.channel)

    @property
    def generations(self) -> "InferenceServiceAsyncStub":
        return InferenceServiceStub(self.channel)

    @property
    def file_artifacts(self) -> "FileArtifactServiceAsyncStub":
        return FileArtifactServiceStub(self.mesh)

    def bearer(self, tenant: Tenant | None = None) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {(tenant or self.acme).secret}"),)

    async def upload(
        self, content: bytes, *, tenant: Tenant | None = None, chunk_bytes: int = 1 << 16, **header: Any
    ) -> file_pb2.File:
        async def messages() -> AsyncIterator[file_service_pb2.UploadFileRequest]:
            yield file_service_pb2.UploadFileRequest(header=file_service_pb2.UploadFileHeader(**header))
            for start in range(0, len(content), chunk_bytes):
                yield file_service_pb2.UploadFileRequest(chunk=content[start : start + chunk_bytes])

        answer = await self.files.UploadFile(messages(), metadata=self.bearer(tenant))
        return answer.file

    async def removals_become(self, count: int) -> None:
        """Returns once so many removals are noted; the process under test is not asked, so its tables are."""
        await eventually(lambda: self.pool.fetchval("SELECT count(*) FROM removals"), lambda noted: noted == count)

    def stored(self) -> list[Path]:
        return [path for path in self.artifacts.rglob("*") if path.is_file()]

    async def assert_nothing_was_kept(self) -> None:
        await self.removals_become(0)
        assert self.stored() == []
        assert await self.pool.fetchval("SELECT count(*) FROM files") == 0


@contextlib.asynccontextmanager
async def refused(reason: str, code: str = "") -> AsyncIterator[list[errors.DomainError]]:
    """The block must fail with this typed error, which is appended to the list."""
    told: list[errors.DomainError] = []
    try:
        yield told
    except grpc.aio.AioRpcError as error:
        typed = errors.unpack(error)
        assert typed.reason == reason, typed
        assert not code or typed.code.name == code
        told.append(typed)
        return
    raise AssertionError(f"nothing failed, {reason} was expected")


@contextlib.asynccontextmanager
async def gateway_world(database_url: str, tls_dir: Path, folder: Path, **overrides: Any) -> AsyncIterator[World]:
    tuning, models, names, inference = Tuning(), Models(), Names(), Inference()
    file_use = FileUse()
    ports: dict[str, int] = {}

    async def serve_scheduler(process: Process) -> None:
        server = ServerBuilder(process, process.settings, trusted_forwarders={"gateway"})
        server.add(
            add_TuningServiceServicer_to_server,
            tuning,
            "finemesh.tuning.v1.TuningService",
            {"gateway"},
            endless={"WatchTuningJob"},
        )
        server.add(add_FileUseServiceServicer_to_server, file_use, "finemesh.artifacts.v1.FileUseService", {"gateway"})
        ports["scheduler"] = await server.start()

    async def serve_inference(process: Process) -> None:
        server = ServerBuilder(process, process.settings, trusted_forwarders={"gateway"})
        server.add(
            add_InferenceServiceServicer_to_server, inference, "finemesh.inference.v1.InferenceService", {"gateway"}
        )
        server.add(add_ModelServiceServicer_to_server, models, "finemesh.models.v1.ModelService", {"gateway"})
        server.add(
            add_ModelArtifactServiceServicer_to_server, names, "finemesh.artifacts.v1.ModelArtifactService", {"gateway"}
        )
        ports["inference"] = await server.start()

    peer = ChassisSettings(service_name="scheduler", tls_dir=tls_dir, drain_grace_s=1)
    other_peer = ChassisSettings(service_name="inference", tls_dir=tls_dir, drain_grace_s=1)
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(living(peer, serve_scheduler))
        await stack.enter_async_context(living(other_peer, serve_inference))
        settings = GatewaySettings(
            **{
                "database_url": database_url,
                "tls_dir": tls_dir,
                "artifacts_url": f"file://{folder}/artifacts",
                "port_file": folder / "mesh.port",
                "public_port_file": folder / "public.port",
                "http_port_file": folder / "http.port",
                "scheduler_address": f"127.0.0.1:{ports['scheduler']}",
                "inference_address": f"127.0.0.1:{ports['inference']}",
                "billing_address": "127.0.0.1:9",
                "key_cache_s": 0.2,
                "drain_grace_s": 2,
                "default_deadline_s": 10,
                **overrides,
            }
        )
        pool = await open_pool(settings)
        stack.push_async_callback(pool.close)
        await migrate(pool, [MIGRATIONS])
        await pool.execute("TRUNCATE organizations, projects, api_keys, files, removals, idempotency, audit_log")
        acme, other = await add_tenant(pool, "acme"), await add_tenant(pool, "other")
        process = await stack.enter_async_context(living(settings, lambda process: main(process, settings)))
        public_port, http_port, mesh_port = (
            int((folder / f"{door}.port").read_text()) for door in ("public", "http", "mesh")
        )
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{public_port}", options=[("grpc.max_send_message_length", -1)])
        stack.push_async_callback(channel.close)
        mesh = open_channel(peer, f"127.0.0.1:{mesh_port}", "gateway")
        stack.push_async_callback(mesh.close)
        yield World(
            settings=settings,
            process=process,
            pool=pool,
            tuning=tuning,
            models=models,
            names=names,
            inference=inference,
            file_use=file_use,
            artifacts=folder / "artifacts",
            channel=channel,
            mesh=mesh,
            acme=acme,
            other=other,
            public_port=public_port,
            http_port=http_port,
        )


async def add_tenant(pool: Any, slug: str, roles: tuple[str, ...] = ROLES) -> Tenant:
    ids, now = SystemIds(), SystemClock().now()
    organization = Organization(organization_id=ids.new("org_"), display_name=slug, create_time=now)
    project = Project(
        project_id=ids.new("proj_"),
        organization_id=organization.organization_id,
        slug=slug,
        display_name=slug,
        create_time=now,
    )
    secret = keys.new_secret()
    key = ApiKey(
        key_id=ids.new("key_"),
        project_id=project.project_id,
        display_name="first",
        secret_prefix=keys.shown_prefix(secret),
        roles=roles,
        create_time=now,
        revoke_time=None,
    )
    async with pool.acquire() as connection:
        store = IdentityStore(connection)
        await store.add_organization(organization)
        await store.add_project(project)
        await store.add_key(key, keys.digest(secret))
    return Tenant(organization_id=organization.organization_id, project_id=project.project_id, secret=secret)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
